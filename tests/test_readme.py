"""README and docs/: their links lead somewhere, their code runs, and what they say of tests, folders and settings is so."""

import ast
import json
import pathlib
import re

import pytest
import tiny_models
import torch
import transformers

import ppo_ext
from bench.demo_runs import paragraph
from bench.render import REPOSITORY, replace_block

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    README,
    *DOCS,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md")),
]
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# ---- links ----------------------------------------------------------------------------------------------------------


def links(page):
    """The targets of all links and images of a page that are not in a block of code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def anchors(page):
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def file_of(link, page):
    """(file or folder of the repository that a link of `page` leads to, anchor); None for a link to somewhere else."""
    path, _, anchor = link.partition("#")
    if link.startswith(REPOSITORY):
        kind, branch, *rest = path.removeprefix(REPOSITORY + "/").split("/")
        return (ROOT / "/".join(rest), anchor) if kind in ("blob", "tree", "raw") and branch == "main" else None
    return None if re.match(r"https?:", link) else (page.parent / path if path else page, anchor)


def test_readme_is_short_and_has_only_absolute_links():
    """A package index shows README alone, so a relative link or image leads nowhere there."""
    assert len(README.read_text().splitlines()) <= 130
    assert len(links(README)) > 10 and all(link.startswith("https://") for link in links(README))
    assert not re.search(r"<(a|img)\s", README.read_text())


def test_readme_shows_the_kept_run_of_the_demo():
    summary = json.loads((ROOT / "bench/demo/summary.json").read_text())
    assert replace_block(README.read_text(), paragraph(summary), "demo") == README.read_text()
    assert summary["passed"] and summary["arguments"]["seed"] == 0


@of_each_page
def test_every_file_that_is_linked_exists(page):
    inside = [(link, *found) for link in links(page) if (found := file_of(link, page))]
    missing = [link for link, target, _ in inside if not target.exists()]
    absolute = [(link, target) for link, target, _ in inside if link.startswith(REPOSITORY)]
    assert not missing and not [link for link, target in absolute if target.is_dir() != ("/tree/" in link)]
    assert not [link for link, target, anchor in inside if anchor and anchor not in anchors(target)]


def test_the_address_of_the_repository_is_the_same_everywhere():
    names = ("pyproject.toml", "CITATION.cff", ".github/ISSUE_TEMPLATE/config.yml")
    for page in [*PAGES, *(ROOT / name for name in names)]:
        addresses = re.findall(r"https://github\.com/[\w-]+/ppo_ext\b", page.read_text())
        assert set(addresses) <= {REPOSITORY}, page
        assert addresses or page not in [README, ROOT / "CITATION.cff"]


@of_each_page
def test_every_page_of_docs_is_linked_from_readme_or_another_page(page):
    others = [
        target.resolve()
        for other in PAGES
        if other != page
        for target, _ in filter(None, (file_of(x, other) for x in links(other)))
    ]
    assert page == README or page.resolve() in others


# ---- code -----------------------------------------------------------------------------------------------------------


def per_token():
    return torch.randn(4, 9)


def for_readme():
    """Texts, a reward, and the tensors of a minibatch."""
    return {
        "batches": [[f"w{i} w{i + 1} w{i + 2}" for i in range(3, 19)]],
        "my_reward": lambda text: float(len(text)),
        "logits": torch.randn(4, 9, 48, requires_grad=True),
        "labels": torch.randint(48, (4, 9)),
        "mask": torch.arange(9) < torch.tensor([[9], [7], [1], [0]]),
        "scores": torch.randn(4),
        "vpreds": per_token().requires_grad_(),
        **{name: per_token() for name in ("old_logprobs", "ref_logprobs", "values")},
    }


def for_migrating(trainer=None):
    """A trainer and what its step takes."""
    queries, responses, scores = tiny_models.batch(4, seed=0)
    trainer = trainer or tiny_models.trainer()
    return {"trainer": trainer, "queries": queries, "responses": responses, "scores": scores}


def for_demo():
    """A reward model and texts."""
    model = transformers.GPT2ForSequenceClassification(tiny_models.build("gpt2", num_labels=1).config)
    return {"reward_model": model, "tokenizer": tiny_models.tokenizer(), "texts": ["w3 w4", "w5 w6 w7"]}


TAKEN_FOR_GRANTED = {"README": for_readme, "migrating-from-trl": for_migrating, "demo": for_demo}
OTHER_TRL = "integrations"  # its code needs a TRL that patch_trl knows; tests/patched_trl/functions.py runs it
with_code = pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page) and page.stem != OTHER_TRL],
    ids=lambda page: page.stem,
)


@with_code
def test_every_block_of_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_models.build("gpt2").save_pretrained("path/to/sft-model")
    tiny_models.tokenizer().save_pretrained("path/to/sft-model")
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), TAKEN_FOR_GRANTED[page.stem]())


def test_averages_over_the_tokens_that_count():
    """What docs/migrating-from-trl.md computes from the statistics is about the tokens that the mask counts."""
    seen = []

    class Recording(ppo_ext.PPOTrainer):
        def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
            ratio = (logprobs - old_logprobs).exp().detach()
            seen.append([x[mask != 0] for x in (ratio, advantages, old_logprobs)])
            return super().loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)

    names = for_migrating(tiny_models.trainer(kind=Recording))
    [block] = [block for block in python_blocks(ROOT / "docs/migrating-from-trl.md") if "mean_ratio" in block]
    exec(compile(block, "migrating-from-trl.md", "exec"), names)
    ratio, advantages, logprobs = (torch.cat(x) for x in zip(*seen))
    assert names["mean_ratio"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert names["counted_advantages"] == pytest.approx(advantages.numpy(), rel=1e-5)
    assert names["mean_logprob"] == pytest.approx(logprobs.mean().item(), rel=1e-5)


# ---- what the pages say of the tests, the folders and the settings --------------------------------------------------


def test_every_test_that_is_named_exists():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    defined = {
        name for path in ROOT.glob("tests/test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 30 and named <= defined, sorted(named - defined)


@pytest.mark.parametrize("page", ["promises", "migrating-from-trl"])
def test_every_row_that_should_name_a_test_does(page):
    tables = (ROOT / f"docs/{page}.md").read_text().split("| kept by |")[1:]
    rows = [line for table in tables for line in table.split("\n\n")[0].splitlines()[2:]]
    assert len(rows) > 10 and not [row for row in rows if "`test_" not in row.split("|")[-2]]


def drawn_blocks():
    return re.findall(r"^```text\n(.*?)^```", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE | re.DOTALL)


def drawn_folders():
    """The folders in the drawing of docs/architecture.md, from the top to the bottom."""
    folders, parent = [], ""
    for indent, name in re.findall(r"^( *)(\w+)/", drawn_blocks()[0], re.MULTILINE):
        parent = parent if indent else name
        folders.append(f"{parent}/{name}" if indent else name)
    return folders


def test_the_folders_that_are_drawn_are_those_that_exist():
    drawn = drawn_folders()
    package = [path.parent.name for path in (ROOT / "ppo_ext").glob("*/__init__.py")]
    assert not [folder for folder in drawn if not (ROOT / folder).is_dir()]
    assert sorted(f"ppo_ext/{name}" for name in package) == sorted(x for x in drawn if x.startswith("ppo_ext/"))
    assert {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h")} <= set(drawn)


def imported_folders(path):
    """The folders of ppo_ext that a module imports from by relative imports, also inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*package[: len(package) - node.level + 1], *(node.module or node.names[0].name).split(".")]
            yield target[1]


def test_a_folder_imports_only_from_those_drawn_below_it():
    order = [folder.removeprefix("ppo_ext/") for folder in drawn_folders() if folder.startswith("ppo_ext/")]
    found = set()
    for position, folder in enumerate(order):
        for path in (ROOT / "ppo_ext" / folder).rglob("*.py"):
            for target in set(imported_folders(path)) & set(order) - {folder}:
                found.add((folder, target))
                assert target in order[position + 1 :], f"{path.relative_to(ROOT)} imports from {target}"
    assert ("trainer", "ops") in found


def test_the_methods_and_ops_that_are_drawn_exist():
    named = set(re.findall(r"(\w+)\(\)", drawn_blocks()[1]))
    methods = {name for name in named if hasattr(ppo_ext.PPOTrainer, name)}
    assert len(methods) == 8 and named - methods <= set(ppo_ext.__all__), named - methods


@of_each_page
def test_every_path_that_is_named_exists(page):
    named = re.findall(r"`((?:ppo_ext|csrc|tests|bench|docs|examples|_build)/[\w/.-]*)`", page.read_text())
    assert not [path for path in named if "my_op" not in path and not (ROOT / path).exists()]


def test_every_environment_variable_is_in_a_page():
    sources = [path for folder in ("ppo_ext", "_build", "csrc") for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in sources if path.suffix in (".py", ".h", ".cpp")]
    read = {name for path in sources for name in re.findall(r"""["'](PPO_EXT_[A-Z_]+)["']""", path.read_text())}
    told = {name for page in PAGES for name in re.findall(r"`(PPO_EXT_[A-Z_]+)", page.read_text())}
    assert {"PPO_EXT_CUDA", "PPO_EXT_CPU_LEVEL"} <= read <= told, sorted(read - told)
