"""Pages about runs: one file of HTML each, which fetches nothing, in light and dark.

    run card(s) ─→ figures (charts, maps of channels) ─→ template ─→ HTML

charts  lines and scatter plots as SVG
maps    which channels an adapter changes, as small pictures
pages   the templates, and what all pages share
run     the page of one run
runs    several runs beside each other: a table, and a page
"""
