"""The report's HTML, as a Jinja2 template."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5a6475; --paper: #ffffff; --page: #f4f5f8;
  --line: #dde1e8; --bar: #d5e3f5; --accent: #0b5cad; --warn: #a14a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a0a9b8; --paper: #1b2029; --page: #12151b;
  --line: #323947; --bar: #24405f; --accent: #7db8f5; --warn: #f0a860; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 48rem; } p.soft, .soft { color: var(--soft); } .soft { font-size: .9rem; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; }
.lead { font-size: 1.05rem; max-width: none; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; font-weight: 600; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: normal;
  min-width: 10.5rem; font-weight: 500; }
tr.group th { color: var(--soft); font-size: .8rem; letter-spacing: .04em; text-transform: uppercase;
  padding-top: 1rem; }
.unit { display: block; font-weight: 400; color: var(--soft); font-size: .8rem; }
.bar { background: linear-gradient(var(--bar), var(--bar)) no-repeat left / var(--share) 100%; }
.range { color: var(--soft); font-size: .82rem; }
.warn { color: var(--warn); font-weight: 400; font-size: .82rem; display: block; }
.strips { display: grid; grid-template-columns: minmax(8rem, 17rem) 1fr; gap: .5rem 1rem; align-items: center; }
.strips .soft { line-height: 1.25; }
.strips img { width: 100%; image-rendering: pixelated; display: block; }
.strips .rule { grid-column: 1 / -1; border-top: 1px solid var(--line); }
.strips .axis { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; text-align: center; }
.picture { max-width: 48rem; background: #fff; border-radius: .6rem; border: 1px solid var(--line); overflow: hidden; }
.picture img { width: 100%; display: block; }
.plans { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { margin-bottom: .4rem; font-size: .92rem; }
code { font: .86em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
details { margin-top: .5rem; } summary { cursor: pointer; color: var(--accent); }
details code { display: block; margin: .2rem 0 .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .strips { grid-template-columns: 1fr; gap: .2rem; } .strips .rule { margin: .4rem 0; }
  .strips .empty { display: none; } th:first-child { min-width: 8.5rem; } main { padding: 1rem .6rem 3rem; }
  .card { padding: .7rem; } .scroll { padding: 0; } }
"""

TEMPLATE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastdiff demo: {{ settings.model }}</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<main>
<h1>fastdiff demo</h1>
<p class="soft">{{ settings.model }}, {{ settings.count }} samples of each row, {{ date }}.
{{ machine }}.</p>
<p class="card lead">{{ headline }}</p>

<h2>Samples</h2>
<p class="soft">Every second of the first 36 samples, good or bad. A column has one seed and one request: what
differs within it is the method's doing.</p>
<div class="card strips">
<div class="empty"></div>
<div class="axis soft" aria-hidden="true">
{% for label in shown_labels %}<span>{{ label }}</span>{% endfor %}
</div>
{% for group, rows in groups %}
<div class="rule"></div>
{% for row in rows %}
<div>{{ row.contender.title }}
<span class="soft">{{ row.speedup.median|fixed(2) }}×</span></div>
<img src="{{ strips[row.contender.key] }}" alt="samples of {{ row.contender.label }}">
{% endfor %}
{% endfor %}
</div>

<h2>Speed and quality</h2>
<div class="card scroll">
<table>
<thead><tr>
<th>Method</th>
<th>Speedup<span class="unit">{{ settings.batch }} at a time</span></th>
<th>Speedup<span class="unit">one at a time</span></th>
<th>MACs<span class="unit">of full</span></th>
<th>FID-{{ settings.count }}<span class="unit">lower is better</span></th>
<th>Change<span class="unit">against full</span></th>
<th>PSNR to full<span class="unit">dB</span></th>
<th>Read correctly<span class="unit">95 % interval</span></th>
</tr></thead>
<tbody>
{% for group, rows in groups %}
<tr class="group"><th>{{ group }}</th><td colspan="7"></td></tr>
{% for row in rows %}
<tr>
<th scope="row">{{ row.contender.label }}
{%- if row.beaten_by %}
<span class="warn">{{ labels[row.beaten_by[-1]] }}: no slower, no worse</span>
{%- endif %}</th>
<td class="bar" style="--share: {{ (100 * row.speedup.median / fastest)|fixed(1) }}%">
{{- row.speedup.median|fixed(2) }}×
{%- if row.speedup.low != row.speedup.high %}<br>
<span class="range">{{ row.speedup.low|fixed(2) }}–{{ row.speedup.high|fixed(2) }}</span>
{%- endif %}</td>
<td>{{ row.single_speedup.median|fixed(2) }}×</td>
<td>{{ row.macs_share|percent(1) }}</td>
<td>{{ (row.score|distance)[0] }}<br><span class="range">±&nbsp;{{ (row.score|distance)[1] }}</span></td>
<td>{% if not row.is_baseline %}{{ row.score|change(scores[row.contender.baseline]) }}{% endif %}</td>
<td>{{ row.psnr|psnr }}</td>
<td>{{ row.score.read_share|percent(1) }}<br>
<span class="range">{{ (100 * row.score.read_low)|fixed(0) }}–{{ row.score.read_high|percent(0) }}</span></td>
</tr>
{% endfor %}
{% endfor %}
<tr class="group"><th>For comparison</th><td colspan="7"></td></tr>
<tr><th scope="row">As many fresh renders</th><td></td><td></td><td></td>
<td>{{ (comparison.renders|distance)[0] }}<br>
<span class="range">±&nbsp;{{ (comparison.renders|distance)[1] }}</span></td><td></td><td></td>
<td>{{ comparison.renders.read_share|percent(1) }}</td></tr>
</tbody>
</table>
</div>

<h2>Is it worth it?</h2>
<p class="soft">Right is faster, and good is at the bottom of the first picture and at the top of the second. The dashed
lines are what simply taking fewer steps gives. A method is worth having where it lies on their good side: below, for
samples like the real thing; above, for the samples that full sampling would have given.</p>
<div class="picture"><img src="{{ pictures["trade-off"] }}"
alt="distance to held-out renders, and to the samples of full sampling, against speedup"></div>

<h2>What ran</h2>
<p class="soft">One line for each evaluation of the denoiser, one column for each of its units. Dark cells were
computed.</p>
<div class="plans">
{% for row in planned %}
<figure><figcaption>{{ row.contender.title }}</figcaption>
<div class="picture">
<img src="{{ pictures["plans/" ~ row.contender.key] }}" alt="plan of {{ row.contender.label }}"></div>
</figure>
{% endfor %}
</div>

<h2>How it was measured</h2>
<ul>
{% for note in notes %}<li>{{ note }}</li>
{% endfor %}
</ul>
<div class="card">
<dl>
{% for name, value in environment.items() %}<dt>{{ name.replace("_", " ") }}</dt><dd>{{ value }}</dd>
{% endfor %}
<dt>sampling</dt><dd>{{ comparison.sampling_seconds|fixed(0) }} s</dd>
</dl>
</div>
<details><summary>Sample a row again</summary>
{% for row in comparison.rows %}<span class="soft">{{ row.contender.group }}: {{ row.contender.label }}</span>
<code>{{ data_rows[row.contender.key].command }}</code>
{% endfor %}
</details>
</main>
</body>
</html>
"""
)
