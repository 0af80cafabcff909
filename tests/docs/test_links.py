"""Links into this repository point to existing files and headings."""

import re
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
REPOSITORY = URLS["Homepage"]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob(".github/**/*.md"))]
INTO_REPOSITORY = re.compile(re.escape(REPOSITORY) + r"/(?:blob|tree)/main/([^#\s)\"']+)(?:#([\w-]+))?")
FILE_NAMES = {file.name for folder in ("hf_topk", "convert", "tests") for file in (ROOT / folder).rglob("*.py")}
# What GitHub itself shows.
OF_GITHUB = {f"{REPOSITORY}{path}" for path in ("", "/issues", "/security/policy", "/security/advisories/new")}


def tokens_of(page: Path) -> list[Token]:
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or []))]


def links_of(page: Path) -> list[str]:
    links = [token.attrs.get("href", token.attrs.get("src")) for token in tokens_of(page)]
    return [str(link) for link in links if link]


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    tokens = tokens_of(page)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, link: str) -> bool:
    if "://" in link and not link.startswith(REPOSITORY):
        return False
    into = INTO_REPOSITORY.fullmatch(link)
    if "://" in link and not into:
        return link not in OF_GITHUB
    path, _, anchor = link.partition("#")
    target = ROOT / into[1] if into else (page.parent / path if path else page)
    anchor = into[2] if into else anchor
    return not target.exists() or (bool(anchor) and anchor not in anchors_of(target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path) -> None:
    assert [link for link in links_of(page) if broken(page, link)] == []


def test_a_broken_link_is_found() -> None:
    readme, design = ROOT / "README.md", ROOT / "docs" / "design.md"
    assert broken(readme, "nowhere.md")
    assert broken(readme, f"{REPOSITORY}/blob/main/nowhere.md")
    assert broken(readme, f"{REPOSITORY}/nowhere")
    assert broken(design, "#nowhere")
    assert not broken(design, "#laws")
    assert not broken(readme, f"{REPOSITORY}/blob/main/docs/design.md#laws")


def test_links_of_the_readme_work_on_pypi() -> None:
    links = links_of(ROOT / "README.md")
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_addresses_of_the_project_exist(url: str) -> None:
    assert not broken(ROOT / "README.md", url)


@pytest.mark.parametrize("file", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda file: file.name)
def test_links_of_issue_templates_exist(file: Path) -> None:
    found = INTO_REPOSITORY.finditer(file.read_text(encoding="utf-8"))
    assert [link[0] for link in found if broken(file, link[0])] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/.-])(?:hf_topk|convert|docs|tests)/[\w./-]*\w", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    names = re.findall(r"`(?:\w+/)*(\w+\.py)`", text)
    assert [name for name in names if name not in FILE_NAMES] == []
