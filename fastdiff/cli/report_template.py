"""The report's HTML, as a Jinja2 template."""

from __future__ import annotations

from fastdiff.eval.report.template import STYLE

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
