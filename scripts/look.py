"""Look at the docs site, and at pages of dmfast report, in Chromium: wide and narrow, light and dark.

    pip install playwright; apt-get install chromium
    make docs; python scripts/look.py [--report PAGE.html ...] [--out build/look]

It leaves a screenshot of each, and ends with 1 where a page scrolls sideways, a file of the site is missing, a script
fails, or the search does not find a word. That a page looks well, only the pictures show.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import itertools
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site"
# the first search result for each word must contain this text
WORDS = {"linear_dm_loss": "linear_dm_loss", "proposal": "proposal", "vLLM": "vllm"}
WIDTHS, SCHEMES = (1440, 360), ("light", "dark")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


def pages(site: Path) -> list[str]:
    """Return the paths of the site's own pages, but of the API's only one."""
    found = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")
    return [path for path in found if "docs/api/" not in path or path.endswith("functional.html")]


def look(browser: Any, address: str, picture: Path) -> list[str]:
    """Return what is wrong with a page, in each width and scheme, and leave pictures of it."""
    wrong = []
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        said: list[str] = []
        page.on("pageerror", lambda error, said=said: said.append(f"a script fails: {error}"))
        page.on("requestfailed", lambda r, said=said: said.append(f"not there: {r.url}"))
        page.on("response", lambda r, said=said: said.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        # the time is long because other work may have the processors
        page.goto(address, timeout=120_000)
        page.wait_for_load_state("networkidle")
        over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if over > 0:
            said.append(f"the page is {over} px too wide")
        page.screenshot(path=f"{picture}_{width}_{scheme}.png", full_page=True)
        wrong += [f"{address} ({width} px, {scheme}): {each}" for each in said]
        context.close()
    return wrong


def search(browser: Any, address: str, folder: Path) -> list[str]:
    """Return the words that the search of the site does not find."""
    wrong = []
    for word, has in WORDS.items():
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        # the time is long because other work may have the processors
        page.goto(address, timeout=120_000)
        page.locator(".md-search__input").click()
        page.locator(".md-search__input").press_sequentially(word)
        first = page.locator(".md-search-result__item").first
        try:
            first.wait_for(timeout=10_000)
            found = first.inner_text()
        except Exception as error:  # playwright raises a timeout error of its own
            found = f"nothing ({type(error).__name__})"
        page.wait_for_timeout(500)
        page.screenshot(path=str(folder / f"search_{word}.png"))
        if has not in found.lower():
            wrong.append(f"{address}: the search for {word} found {found[:80]!r} first")
        page.close()
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at all pages, and return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", nargs="*", type=Path, default=[], help="pages of dmfast report")
    parser.add_argument("--only", default="", help="of the site, the pages whose path has this")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "look")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    if not SITE.is_dir() and not args.report:
        print("there is no build/site: run make docs", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for path in [each for each in pages(SITE) if args.only in each] if SITE.is_dir() else []:
            wrong += look(browser, home + path, args.out / path.removesuffix(".html").replace("/", "_"))
        if SITE.is_dir():
            wrong += search(browser, home + "index.html", args.out)
        for report in args.report:
            wrong += look(browser, report.resolve().as_uri(), args.out / f"report_{report.stem}")
        browser.close()
    server.shutdown()
    print("\n".join(wrong) or f"nothing is wrong; the pictures are in {args.out}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
