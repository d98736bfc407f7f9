"""Style: how the summary page looks, on paper-white and on black."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --shade: #f1f3f4; --rule: #dfe3e6;
  --ink: #1d2327; --soft: #5b6670; --link: #0b5cad;
  --live: #0f766e; --never: #8a949d; --episode: #f5b94133;
  --promoted: #15803d; --refused: #a21caf; --bad: #c81e1e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181b; --card: #1b2024; --shade: #20262b; --rule: #2d3439;
    --ink: #e6e9eb; --soft: #9aa5ad; --link: #7cb8f5;
    --live: #2dd4bf; --never: #8b969f; --episode: #f5b9412e;
    --promoted: #4ade80; --refused: #e879f9; --bad: #f87171;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0 0 .25rem; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .75rem; }
h2::first-letter { text-transform: uppercase; }
p { margin: .25rem 0; }
a { color: var(--link); }
.soft { color: var(--soft); }
.card {
  padding: 1rem; overflow-x: auto;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
.warning {
  margin: .75rem 0; padding: .5rem .75rem;
  background: var(--card); border-left: 4px solid var(--bad);
}

svg { display: block; width: 100%; min-width: 640px; height: auto; font: 12px system-ui, sans-serif; }
.act { fill: transparent; }
.act.odd { fill: var(--shade); }
.acttitle { fill: var(--soft); font-weight: 600; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); }
.episode { fill: var(--episode); }
.live, .never { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.live { stroke: var(--live); }
.never { stroke: var(--never); stroke-dasharray: 5 4; }
.point { fill: var(--live); }
.request line { stroke-width: 1; stroke-dasharray: 2 3; }
.request path { stroke-width: 2.5; fill: none; }
.request.promoted line, .request.promoted path { stroke: var(--promoted); }
.request.promoted path { fill: var(--promoted); }
.request.refused line, .request.refused path { stroke: var(--refused); }
.request.other line, .request.other path { stroke: var(--bad); }
.kill circle { fill: var(--bad); }
.kill text { fill: var(--bad); font-weight: 700; }

.legend {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  margin: .25rem 0 0; color: var(--soft); font-size: .875rem;
}
.legend svg {
  display: inline-block; width: 1.6rem; min-width: 0; height: .9rem;
  margin-right: .35rem; vertical-align: -.1rem;
}

table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td {
  padding: .45rem .75rem .45rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule);
}
tr:last-child td, tr:last-child th { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; }
td.promoted, td.refused, td.other { font-weight: 600; }
td.promoted { color: var(--promoted); }
td.refused { color: var(--refused); }
td.other { color: var(--bad); }

.facts { columns: 2 20rem; column-gap: 3rem; }
.facts div {
  display: flex; justify-content: space-between; gap: 1rem; padding: .3rem 0;
  border-bottom: 1px solid var(--rule); break-inside: avoid;
}
.facts span { color: var(--soft); }
.facts b { font-weight: 600; text-align: right; }
code, pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
""".strip()
