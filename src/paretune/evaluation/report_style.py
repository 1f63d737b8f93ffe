"""The report's style sheet: light, dark, phone and print."""

LEVELS = 11  # of colour in the heat map

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5a636c; --paper: #fff; --card: #f7f8f9; --line: #dfe3e6;
  --shade: #eef1f3; --gain: #0072b2; --loss: #d55e00; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0 .25rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .6rem; }
p, ul { max-width: 52rem; } .soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13.5rem), 1fr)); gap: .75rem;
  margin: 1.4rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: .8rem; color: var(--soft); line-height: 1.4; }
figure { margin: 1rem 0 0; } figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.narrow { display: none; } figcaption { margin-top: .5rem; max-width: 52rem; }
.wide { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--line); border-radius: .6rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .84rem; font-variant-numeric: tabular-nums;
  width: 100%; overflow-wrap: normal; }
th, td { padding: .34rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; color: var(--soft); background: var(--card); vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--paper); z-index: 1; }
thead th:first-child { background: var(--card); }
tbody th { font-weight: 500; text-align: left; white-space: normal; min-width: 9.5rem; max-width: 20rem;
  overflow-wrap: anywhere; } thead th:first-child, .text { text-align: left; }
td.text { white-space: normal; min-width: 8rem; overflow-wrap: anywhere; } td small { color: var(--soft); }
tr.front th { font-weight: 700; } th small { font-weight: 400; color: var(--soft); white-space: nowrap; }
tbody th i { display: inline-block; width: .68em; height: .68em; margin-right: .45em; border-radius: 2px; }
.map td { text-align: center; border-left: 2px solid var(--paper); border-bottom: 2px solid var(--paper); }
.map td[class^=g] { background: color-mix(in oklab, var(--gain) var(--s), var(--paper)); }
.map td[class^=l] { background: color-mix(in oklab, var(--loss) var(--s), var(--paper)); }
.gain { color: var(--gain); } .loss { color: var(--loss); } .gain, .loss { font-weight: 600; }
.bar { display: inline-block; height: .7em; border-radius: 0 2px 2px 0; background: var(--soft);
  min-width: 1px; vertical-align: baseline; margin-left: .5em; } .bars td { text-align: left; min-width: 9.5rem; }
.bars td span.n { display: inline-block; min-width: 3em; text-align: right; }
code { font: .84em ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.25rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 700px) {
  body { padding: 1rem .8rem 3rem; font-size: 15px; } h1 { font-size: 1.45rem; }
  .broad { display: none; } .narrow { display: block; }
  tbody th { min-width: 7.5rem; max-width: 9.5rem; } th, td { padding: .32rem .5rem; } .bars td { min-width: 8.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9ecef; --soft: #a3abb3; --paper: #15181b; --card: #1d2125; --line: #32383d; --shade: #20262b;
    --gain: #56a8e0; --loss: #f0884a; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --card: #fff; --line: #bbb; --shade: #eef1f3;
    --gain: #0072b2; --loss: #d55e00; }
  @page { size: A4 landscape; margin: 12mm; }
  body { font-size: 10pt; max-width: none; padding: 0; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .broad { display: block; } .narrow { display: none; } h2, h2 + p { break-after: avoid; } h2 { margin-top: 6mm; }
  figure { margin: 0; } figure svg { max-height: 84mm; }
  .wide { overflow: visible; border: 0; } table { font-size: 6.6pt; width: auto; }
  table.map, table.bars { font-size: 8pt; } th, td { padding: 1pt 3pt; }
  tbody th { min-width: 0; max-width: 45mm; } td.text { min-width: 0; } tr, figure, .tile { break-inside: avoid; }
  thead { display: table-header-group; } tbody th, thead th:first-child { position: static; }
}
""" + "".join(f".g{level},.l{level}{{--s:{5 * level}%}}" for level in range(1, LEVELS + 1))
