"""Hold the page's style sheet, with a palette for light and one for dark."""

from __future__ import annotations

from .marks import COLORS

_LIGHT = ("#0072b2", "#d55e00", "#008a66", "#b3478a", "#8a6d00", "#2f7fb8", "#555555", "#a0341f")
_DARK = ("#5ab4f0", "#ff9350", "#35d0a5", "#ec8fc8", "#e8c547", "#9bd0ff", "#c0c0c0", "#ff7f66")
assert len(_LIGHT) == len(_DARK) == COLORS
_CSS = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1f23; --faint: #5c6670; --rule: #d8dde2; --card: #f6f8fa;
  --shade: #0003; --yes: #1a7f37; --no: #b35900; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181c; --ink: #e4e8ec; --faint: #9aa5b0; --rule: #353c44; --card: #1c2228; --shade: #000c;
    --yes: #4ac26b; --no: #f0a050; DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 100rem; padding: 1rem clamp(.75rem, 2.5vw, 2.5rem) 3rem; background: var(--back);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.45rem; margin: .3rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0; } h4 { font-size: .85rem; margin: 0; color: var(--faint); }
p { margin: .3rem 0; } .faint, small { color: var(--faint); font-size: .85rem; } a { color: inherit; }
.runs { list-style: none; padding: 0; margin: .6rem 0; display: grid; gap: .35rem; }
.run { white-space: nowrap; } .run svg { vertical-align: -.1em; }
.chip { display: inline-block; border: 1px solid var(--rule); border-radius: 1em; padding: 0 .6em; font-size: .85rem; }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .8rem; }
.verdicts section { border: 1px solid var(--rule); border-left: 5px solid var(--rule); border-radius: 6px;
  padding: .6rem .9rem; background: var(--card); }
.verdicts .yes { border-left-color: var(--yes); } .verdicts .no { border-left-color: var(--no); }
.verdicts .yes strong { color: var(--yes); } .verdicts .no strong { color: var(--no); }
.frame { margin: .8rem 0; max-width: max-content; min-width: min(100%, 34rem); timeline-scope: --across; }
.wide { overflow-x: auto; scroll-timeline: --across inline; border: 1px solid var(--rule); border-radius: 6px;
  background:
    linear-gradient(to right, var(--back) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--back) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / .9rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / .9rem 100% no-repeat scroll; }
.hint { max-height: 0; overflow: hidden; margin: 0; text-align: right; animation: hint linear both;
  animation-timeline: --across; }
@keyframes hint { from, to { max-height: 3em; } }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .28rem .7rem; border-top: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: normal; }
table > :first-child > tr:first-child > * { border-top: 0; }
th { font-weight: 600; } td details { margin: 0; max-width: 26rem; overflow-wrap: anywhere; }
tbody th { font-weight: 400; color: var(--faint); position: sticky; left: 0; background: var(--back);
  min-width: 5.5rem; }
tbody th[scope=rowgroup] { color: var(--ink); font-weight: 600; background: var(--card); position: static; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem .8rem .5rem; border: 1px solid var(--rule); border-radius: 6px; }
figure > svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.phases { display: grid; grid-template-columns: auto auto 1fr; gap: .35rem .8rem; align-items: center; }
.bar { display: flex; height: 1.2rem; } .bar span { min-width: 1px; outline: 1px solid var(--back); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-bottom: .5rem; }
.swatch { display: inline-block; width: 1.5em; height: .9em; margin-right: .4em; vertical-align: -.05em;
  outline: 1px solid var(--faint); }
.phase0 { background: color-mix(in srgb, var(--ink) 75%, var(--back)); }
.phase1 { background: repeating-linear-gradient(45deg, var(--faint) 0 2px, var(--back) 2px 6px); }
.phase2 { background: color-mix(in srgb, var(--ink) 32%, var(--back)); }
.phase3 { background: repeating-linear-gradient(-45deg, var(--ink) 0 3px, var(--back) 3px 5px); }
.phase4 { background: repeating-linear-gradient(90deg, var(--faint) 0 1px, var(--back) 1px 4px); }
.samples { border: 1px solid var(--rule); border-radius: 6px; padding: .7rem .9rem; margin-bottom: 1rem; }
.prompt { background: var(--card); padding: .4rem .6rem; border-radius: 4px; margin-bottom: .6rem; }
.prompt details { margin: 0; } .text { white-space: pre-wrap; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .8rem 1.4rem; }
.samples ol { margin: .3rem 0 0; padding: 0; list-style: none; } .samples li { white-space: pre-wrap; padding: .35rem 0;
  border-top: 1px solid var(--rule); font-size: .9rem; }
details { margin: .8rem 0; } summary { cursor: pointer; } summary h2 { display: inline; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .4rem 1.2rem; margin: .6rem 0;
  max-width: 60rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 40rem) { body { font-size: 14px; } table { font-size: .85rem; } th, td { padding: .25rem .4rem; }
  tbody th { min-width: 4rem; } .phases { grid-template-columns: 1fr auto; } .phases .bar { grid-column: 1 / -1; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { .wide { overflow: visible; } figure, section { break-inside: avoid; } }
"""


def css() -> str:
    """Return the style sheet."""
    light, dark = ("".join(f"--run{i}: {c};" for i, c in enumerate(each)) for each in (_LIGHT, _DARK))
    return _CSS.replace("LIGHT", light, 1).replace("DARK", dark, 1)
