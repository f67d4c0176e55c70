"""MkDocs hooks: pages from outside of docs/, links that work in the repository and on the site, formulas, no network.

The pages are written for the repository: a link is a path in it. On the site, a link to a page leads to that page, and
a link to any other file or folder to a page that shows it.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Where pages and pictures from outside of docs/ are on the site, by their place in the repository.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "benchmarks/results/epyc-2core.md": "benchmarks/results/epyc-2core.md",
    "benchmarks/results/epyc-2core-bandwidth.png": "benchmarks/results/epyc-2core-bandwidth.png",
    "benchmarks/results/epyc-2core-scaling.png": "benchmarks/results/epyc-2core-scaling.png",
}
INSIDE = {place: source for source, place in OUTSIDE.items()}
#: Where the pages are that show other files.
SOURCE = "source"
FENCE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)#\s]+)")
MATH = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
#: What a browser would fetch from another place.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\s>]+"
    r"|<link\b(?=[^>]*rel=[\"']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=[\"']?(?:https?:)?//[^\s>]+"
)
FETCHED_BY_CSS = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\s)]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is outside of docs/, and a page for each other file that a page links to."""
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for page in [file for file in files if file.is_documentation_page()]:
        for part in FENCE.split(page.content_string)[::2]:
            for _, target in LINK.findall(part):
                path = _in_repository(page.src_uri, target)
                if (
                    path is not None
                    and _place(path).startswith(f"{SOURCE}/")
                    and files.get_file_from_path(_place(path)) is None
                ):
                    _show(path, files, config)
    return files


def _show(path: str, files: Files, config: MkDocsConfig) -> None:
    """Add a page that shows a file, or the files of a folder with a page for each."""
    full = ROOT / path
    if full.is_dir():
        names = sorted(each.name for each in full.iterdir() if each.is_file() and not each.name.startswith("."))
        body = "\n".join(f"- [{name}]({posixpath.basename(path)}/{name}.md)" for name in names)
        for name in names:
            if files.get_file_from_path(_place(f"{path}/{name}")) is None:
                _show(f"{path}/{name}", files, config)
    else:
        try:
            text = full.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = "(not a file of text)"
        language = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".json": "json", ".h": "cpp", ".cpp": "cpp"}
        body = f"``````{language.get(full.suffix, 'text')}\n{text}\n``````"
    content = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n{body}\n"
    files.append(File.generated(config, _place(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV))


def _in_repository(page: str, target: str) -> str | None:
    """The path in the repository that a link of a page means; None for an address."""
    if "://" in target or target.startswith(("mailto:", "/")) or page.startswith(f"{SOURCE}/"):
        return None
    source = INSIDE.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if (ROOT / path).exists() else None  # MkDocs says what is not there


def _place(path: str) -> str:
    """Where the site has a path of the repository."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{SOURCE}/{path}.md"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to places on the site."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, match[2])
        return match[0] if path is None else f"{match[1]}{posixpath.relpath(_place(path), here or '.')}"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which browsers show without a script."""

    def formula(match: re.Match[str]) -> str:
        tex = html.unescape(match[2]).strip()
        display = "block" if match[1] == "div" else "inline"
        tex = tex.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
        return convert(tex.replace("{aligned}", "{align*}"), display=display)

    return MATH.sub(formula, content)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that fetches something from the net.

    Raises:
        PluginError: a page or a stylesheet does; the message names it.
    """
    for folder, _, names in os.walk(config.site_dir):
        for name in names:
            wanted: Any = {".html": FETCHED, ".css": FETCHED_BY_CSS}.get(Path(name).suffix)
            found = wanted and wanted.search(Path(folder, name).read_text(encoding="utf-8"))
            if found:
                raise PluginError(f"{Path(folder, name).relative_to(config.site_dir)} fetches from the net: {found[0]}")
