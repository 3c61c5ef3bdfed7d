"""The report's HTML, as a Jinja2 template."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5a6475; --paper: #ffffff; --page: #f4f5f8;
  --line: #dde1e8; --bar: #d5e3f5; --accent: #0b5cad; --warn: #a14a00; --good: #00674c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a0a9b8; --paper: #1b2029; --page: #12151b;
  --line: #323947; --bar: #24405f; --accent: #7db8f5; --warn: #f0a860; --good: #5cc9a7; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 48rem; } p.soft, .soft { color: var(--soft); } .soft { font-size: .9rem; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; }
.lead { font-size: 1.05rem; max-width: none; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .45rem .55rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; font-weight: 600; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: normal;
  min-width: 13rem; font-weight: 500; overflow-wrap: anywhere; z-index: 1; }
tr.group th { color: var(--soft); font-size: .8rem; letter-spacing: .04em; text-transform: uppercase;
  padding-top: 1rem; }
.unit { display: block; font-weight: 400; color: var(--soft); font-size: .8rem; white-space: normal;
  min-width: 4.6rem; }
.bar { background: linear-gradient(var(--bar), var(--bar)) no-repeat left / var(--share) 100%; }
.range { color: var(--soft); font-size: .82rem; }
.warn { color: var(--warn); font-weight: 400; font-size: .82rem; display: block; }
.why { text-align: left; color: var(--soft); font-size: .85rem; }
.why span { position: sticky; left: 14rem; display: inline-block; white-space: normal; max-width: min(42rem, 48vw);
  overflow-wrap: anywhere; }
.verdict { font-size: .82rem; color: var(--soft); } .verdict.better { color: var(--good); }
.verdict.worse, .verdict.mixed { color: var(--warn); }
.strips { display: grid; grid-template-columns: minmax(8rem, 17rem) 1fr; gap: .5rem 1rem; align-items: center;
  overflow-wrap: anywhere; }
.strips .soft { line-height: 1.25; }
.strips img { width: 100%; image-rendering: pixelated; display: block; }
.strips .rule { grid-column: 1 / -1; border-top: 1px solid var(--line); } .strips .rule:first-child { display: none; }
.strips .axis { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; text-align: center; }
.picture { max-width: 48rem; margin-bottom: 1rem;
  background: #fff; border-radius: .6rem; border: 1px solid var(--line); overflow: hidden; }
.picture img { width: 100%; display: block; }
.plans { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { margin-bottom: .4rem; font-size: .92rem; overflow-wrap: anywhere; }
code { font: .86em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
details { margin-top: .5rem; } summary { cursor: pointer; color: var(--accent); }
details code { display: block; margin: .2rem 0 .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .strips { grid-template-columns: 1fr; gap: .2rem; } .strips .rule { margin: .4rem 0; }
  .strips .empty { display: none; } th:first-child { min-width: 8.5rem; }
  .why span { left: 9rem; } .wide { overflow-x: auto; } .wide img { min-width: 40rem; }
  main { padding: 1rem .6rem 3rem; }
  .card { padding: .7rem; } .scroll { padding: 0; } }
"""

TEMPLATE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastdiff: {{ header.model }}</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<main>
<h1>{{ header.model }}, full and fast</h1>
<p class="soft">{{ header.num_samples }} samples of each row, {{ header.date }}. {{ machine }}.</p>
<p class="card lead">{{ headline }}</p>

<h2>Samples</h2>
<p class="soft">{{ shown }} images of each row, evenly spaced, good or bad. A column has one seed and one request: what
differs within it is the method's doing.</p>
<div class="card strips">
{% for group, points in groups if points|selectattr("quality")|list %}
<div class="rule"></div>
{% for point in points if point.quality %}
<div>{{ point|name }} <span class="soft">{{ results.timing(point)|speedup }}</span></div>
<img src="{{ strips[point.key] }}" alt="samples of {{ point|name }}">
{% endfor %}
{% endfor %}
</div>

<h2>Speed and quality</h2>
<div class="card scroll">
<table>
<thead><tr>
<th>Sampling</th>
{% if results.batch %}<th>Speedup<span class="unit">{{ results.batch }} at a time</span></th>{% endif %}
{% if results.batch and results.batch != 1 %}<th>Speedup<span class="unit">one at a time</span></th>{% endif %}
<th>MACs<span class="unit">of full</span></th>
{% if matched %}<th>To plain sampling<span class="unit">in the same time</span></th>{% endif %}
{% for name in criteria %}
<th>{{ catalogue[name].title }}<span class="unit">{{ catalogue[name].unit }}
{{- ", " if catalogue[name].unit else "" }}{{ "more" if catalogue[name].better > 0 else "less" }} is better</span></th>
{% endfor %}
</tr></thead>
<tbody>
{% for group, points in groups %}
<tr class="group"><th>{{ group }}</th><td colspan="{{ columns }}"></td></tr>
{% for point in points %}
<tr>
<th scope="row">{{ point.way.label or point.way.spec }}
{%- for note in point.notes %}<span class="warn">{{ note }}</span>{% endfor %}</th>
{% if not point.quality %}
<td colspan="{{ columns }}" class="why"><span>{{ point.error.message if point.error else "not sampled" }}</span></td>
{% else %}
{% set timing = results.timing(point) %}
{% if results.batch %}
<td class="bar" style="--share: {{ timing|bar(fastest) }}%">{{ timing|speedup }}
{%- if timing and timing.speedup.low != timing.speedup.high %}<br>
<span class="range">{{ timing.speedup.low|fixed(2) }}–{{ timing.speedup.high|fixed(2) }}</span>
{%- endif %}</td>
{% endif %}
{% if results.batch and results.batch != 1 %}<td>{{ point.timings.get(1)|speedup }}</td>{% endif %}
<td>{{ point.macs_share|percent }}</td>
{% if matched %}
{% set match = results.match(point) %}
<td>{% if match %}<span class="verdict {{ results.verdict(point) }}">{{ results.verdict(point) }}</span><br>
<span class="range">{{ match.way.num_inference_steps }} steps</span>{% endif %}</td>
{% endif %}
{% for name in criteria %}
{% set value, interval = point.quality.get(name)|value(name) %}
<td>{{ value }}{% if interval %}<br><span class="range">{{ interval }}</span>{% endif %}</td>
{% endfor %}
{% endif %}
</tr>
{% endfor %}
{% endfor %}
{% if floor %}
<tr class="group"><th>For comparison</th><td colspan="{{ columns }}"></td></tr>
<tr><th scope="row">As many perfect samples</th>
<td colspan="{{ columns - (criteria|length) }}"></td>
{% for name in criteria %}
{% set value, interval = floor.get(name)|value(name) %}
<td>{{ value }}{% if interval %}<br><span class="range">{{ interval }}</span>{% endif %}</td>
{% endfor %}</tr>
{% endif %}
</tbody>
</table>
</div>

{% if plots %}
<h2>Is it worth it?</h2>
<p class="soft">Right is faster. The dashed line is what simply taking fewer steps gives, dotted lines are other
packages, and what another point beats in both is faded. A method is worth having where it lies on the good side of the
dashed line.</p>
{% for name in plots %}
<div class="picture wide"><img src="{{ pictures["trade-off-" ~ name] }}"
alt="{{ catalogue[name].title }} against speedup"></div>
{% endfor %}
{% endif %}

{% if planned %}
<h2>What ran</h2>
<p class="soft">One line for each evaluation of the denoiser, one column for each of its units. Dark cells were
computed.</p>
<div class="plans">
{% for point in planned %}
<figure><figcaption>{{ point|name }}</figcaption>
<div class="picture">
<img src="{{ pictures["plans/" ~ point.key] }}" alt="plan of {{ point|name }}"></div>
</figure>
{% endfor %}
</div>
{% endif %}

<h2>How it was measured</h2>
<ul>
{% for note in notes %}<li>{{ note }}</li>
{% endfor %}
</ul>
<div class="card">
<dl>
{% for name, value in facts.items() %}<dt>{{ name.replace("_", " ") }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
</div>
<details><summary>Measure it again</summary>
<code>{{ header.command }}</code>
</details>
{% if results.batch %}
<details><summary>Latency and memory</summary>
<div class="scroll">
<table>
<thead><tr><th>Sampling</th><th>Images<span class="unit">at a time</span></th>
<th>p50</th><th>p95</th><th>Images<span class="unit">per second</span></th>
<th>Denoiser<span class="unit">p50</span></th><th>Denoiser<span class="unit">speedup</span></th>
<th>Peak memory<span class="unit">GiB</span></th></tr></thead>
<tbody>
{% for point in results.points %}
{% for batch, timing in point.timings|dictsort %}
<tr><th scope="row">{{ point|name }}</th><td>{{ batch }}</td>
<td>{{ timing.pipeline.seconds|seconds }}</td><td>{{ timing.pipeline.p95|seconds }}</td>
<td>{{ timing.pipeline.images_per_second|fixed(2) }}</td>
<td>{{ timing.denoiser.seconds|seconds if timing.denoiser else "–" }}</td>
<td>{{ timing.denoiser_speedup.median|fixed(2) ~ "×" if timing.denoiser_speedup else "–" }}</td>
<td>{{ (timing.peak_bytes / 2**30)|fixed(2) if timing.peak_bytes else "–" }}</td></tr>
{% endfor %}
{% endfor %}
</tbody>
</table>
</div>
</details>
{% endif %}
</main>
</body>
</html>
"""
)
