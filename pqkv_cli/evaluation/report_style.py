"""The style sheet of a report: light and dark, phone and desk, print. Knows class names alone."""

STYLE = """
:root{--ink:#14181d;--soft:#4a5561;--ground:#fff;--card:#f3f5f7;--rule:#c9d0d8;--heat:#0b5a86;--on-heat:#fff;--warn:#8a2c0d;
--c0:#0b5a86;--c1:#b3470f;--c2:#2f7a3b;--c3:#8a3a8f;--c4:#7a6108;--c5:#b02a4c;--c6:#3f5fc0;--c7:#5d6670}
@media(prefers-color-scheme:dark){:root{--ink:#eef1f4;--soft:#b3bdc8;--ground:#12161b;--card:#1c222a;--rule:#3b4653;
--heat:#8ccdf2;--on-heat:#06202e;--warn:#ffb59a;--c0:#8ccdf2;--c1:#ffb07a;--c2:#8ddb9a;--c3:#e2a6e6;--c4:#e6d06a;--c5:#ff9db3;
--c6:#b0c2ff;--c7:#c2cad3}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.15rem;margin:2rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--rule)}
code{font:.9em ui-monospace,Menlo,Consolas,monospace}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;padding:0;margin:0;list-style:none}
.tiles li{background:var(--card);border-radius:.5rem;padding:.75rem}
.tiles span{display:block;color:var(--soft);font-size:.85rem}
.tiles strong{display:block;font-size:1.6rem;line-height:1.3}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{text-align:left;color:var(--soft);padding:.25rem 0}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--rule);text-align:right;vertical-align:top}
th[scope=row],thead th:first-child{text-align:left}
thead th{color:var(--soft);font-weight:600}
tbody th{font-weight:500}
figure{margin:0 0 1rem}
figcaption{color:var(--soft);font-size:.9rem}
svg{display:block;max-width:100%;height:auto}
svg text{fill:var(--ink);font-family:inherit}
svg .tick{font-size:13px}
svg .axis{font-size:13px;fill:var(--soft)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .line{fill:none;stroke-width:2.5}
svg .heat{fill:var(--heat)}
svg .ground{fill:var(--card)}
svg .none{fill:none;stroke:var(--rule);stroke-dasharray:3 3}
svg .value{font-size:13px;font-weight:600}
svg .on-light{fill:var(--ink)}
svg .on-dark{fill:var(--on-heat)}
.pair{display:flex;flex-wrap:wrap;gap:1rem 2.5rem}
.pair>div{flex:1 1 24rem;min-width:0}
.pair figure{flex:1 1 18rem;min-width:0;max-width:100%}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;padding:0;margin:-.5rem 0 1.25rem;font-size:.9rem}
.key{display:inline-block;width:1.1rem;height:.3rem;margin-right:.4rem;vertical-align:middle;border-radius:2px}
.warnings{color:var(--warn);padding-left:1.2rem}
footer{margin-top:2rem;color:var(--soft);font-size:.85rem;border-top:1px solid var(--rule)}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
@media(max-width:40rem){.chart .tick,.chart .axis{font-size:19px}.legend{margin-top:0}
th,td{padding:.35rem .4rem}tbody th,thead th:first-child{position:sticky;left:0;background:var(--ground);max-width:8rem}}
@media print{body{max-width:none}.scroll{overflow:visible}}
""" + "".join(
    f".line.c{i}{{stroke:var(--c{i})}}.dot.c{i}{{fill:var(--c{i})}}.key.c{i}{{background:var(--c{i})}}\n" for i in range(8)
)
