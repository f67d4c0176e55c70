"""Every Python fragment of the README and of the pages below runs, in the order of its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cases import HAS_EMULATOR

import fusedopt.training.engine  # noqa: F401  what it registers must not be forgotten with what a page does
from fusedopt.training.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    DOCS / "choose.md",
    DOCS / "migration.md",
    DOCS / "wrappers.md",
    DOCS / "averaging.md",
    DOCS / "config.md",
    DOCS / "debugging.md",
    DOCS / "engine.md",
    pytest.param(
        DOCS / "ptx.md", marks=pytest.mark.skipif(not HAS_EMULATOR, reason="built without FUSEDOPT_EMULATOR=1")
    ),
    DOCS / "schedulers.md",
    *sorted((DOCS / "optimizers").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fragments_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fragments = re.findall(r"```(?:python|yaml)\n(.*?)```", page.read_text(), re.DOTALL)
    assert fragments, "the page shows no code"
    if "```yaml" in page.read_text():
        pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'fusedopt[engine]'")
    monkeypatch.chdir(tmp_path)
    for registry in (OPTIMIZERS, OPTIM_WRAPPER_CONSTRUCTORS, MODELS, DATASETS, METRICS, HOOKS):
        monkeypatch.setattr(registry, "_modules", dict(registry._modules))
    namespace: dict[str, object] = {}
    for number, fragment in enumerate(fragments, 1):
        file = re.match(r"# (\S+\.(?:py|yaml))\n", fragment)  # a fragment may be a file that the next ones read
        if file:
            Path(file[1]).write_text(fragment)
            continue
        exec(compile(fragment, f"{page.name}, fragment {number}", "exec"), namespace)


def test_the_kernels_page_quotes_the_source() -> None:
    files = (REPOSITORY / "fusedopt" / "backends" / "triton_kernels").rglob("*.py")
    source = "\n".join(path.read_text() for path in files)
    quotations = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "kernels.md").read_text(), re.DOTALL)
    assert len(quotations) >= 8
    for quotation in quotations:
        assert quotation in source, f"not, or no longer, in the source:\n{quotation}"


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    headings = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", headings, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_point_to_files_and_headings_that_exist() -> None:
    for page in [*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", without_code(page.read_text())):
            if "://" in target:
                continue
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name} links to {target}, which is not there"
            if anchor and path.suffix == ".md":
                assert anchor in anchors(path), f"{page.name} links to {target}#{anchor}, a heading that is not there"
