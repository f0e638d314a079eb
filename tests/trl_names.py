"""`python -m tests.trl_names [--save]`: which names of which TRL release `ppo_ext.trl` has, and why it lacks the others.

The names are read from the source of the releases' wheels, not imported: the modules that hold TRL's PPO, with the members
of their classes. Whether a name is here is found out by importing `ppo_ext.trl`. A name that is neither here nor covered by
`ABSENT` fails.
"""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

EVIDENCE = pathlib.Path(__file__).parent.parent / "bench" / "evidence"
RELEASES = ("0.7.0", "0.7.4", "0.7.11", "0.8.6", "0.9.6", "0.10.1", "0.11.4")
# the modules in which PPO is; the names of the others are not looked at one by one
MODULES = (
    "",
    "core",
    "env_utils",
    "extras",
    "extras.best_of_n_sampler",
    "import_utils",
    "models",
    "models.modeling_base",
    "models.modeling_value_head",
    "models.utils",
    "trainer",
    "trainer.base",
    "trainer.ppo_config",
    "trainer.ppo_trainer",
    "trainer.utils",
)
# reason -> the names it is about, as patterns for "module:name" or, of a whole module, "module"
ABSENT = {
    "another way of training": r".*:(AlignProp|BCO|CPO|DDPO|DPO|Default[A-Z]|FDivergence|GKD|GeometricMixture)\w*(\.\w+)?|"
    r".*:(IterativeSFT|KTO|NashMD|OnPolicy|OnlineDPO|OnlineTrainer|Onpolicy|ORPO|PPOv2|PerPrompt|RLOO|XPO)\w*(\.\w+)?|"
    r"trainer\.(alignprop|bco|cpo|ddpo|dpo|gkd|iterative_sft|kto|nash_md|online_dpo|orpo|ppov2|rloo|xpo)_\w+|"
    r"models\.(auxiliary_modules|modeling_sd_base|sd_utils)",
    "helper of the trainers that followed PPOTrainer": r"trainer\.utils:(add_\wos_token_if_needed|batch_generation|cap_exp|"
    r"decode_and_strip_padding|first_true_indices|forward|generate|get_exp_cap|get_global_statistics|get_reward|pad|"
    r"pad_to_length|prepare_deepspeed|print_rich_table|truncate_response|truncate_right|SIMPLE_\w+)|.*:empty_cache",
    "preparation of data for other trainers": r".*:(ConstantLengthDataset|DataCollatorFor\w+|RewardDataCollatorWithPadding)"
    r"(\.\w+)?|extras\.dataset_formatting|data_utils|:(\w*apply_chat_template|\w*extract_prompt|is_conversational|"
    r"\w*unpair_preference_dataset)",
    "chat formats": r".*:(ChatMlSpecialTokens|FORMAT_MAPPING|setup_chat_format)(\.\w+)?",
    "text environments": r".*:Text(Environment|History)|environment(\.\w+)?",
    "judges and callbacks": r".*:(\w*Judge|\w+Callback)(\.\w+)?|trainer\.(judges|callbacks)",
    "command line of TRL": r"commands(\.[\w.]+)?|trainer\.(model_config|training_configs)|.*:(\w+ScriptArguments|TrlParser|"
    r"init_zero_verbose|JSONDict|autotag|ModelConfig|get_kbit_device_map|get_peft_config|get_quantization_config|"
    r"trl_sanitze_kwargs_for_tagging)",
    "part of other trainers' set-up of a model": r".*:(peft_module_casting_to_bf16|neftune_post_forward_hook)",
    "internal to TRL": r".*:(OptionalDependencyNotAvailable|PreTrainedModelWrapper\.(_get_checkpoint_from_hub|supported_"
    r"pretrained_model_architectures)|"
    r"AutoModel\w+\._(init_weights|has_lm_head)|add_hooks|remove_hooks|iter_params|get_all_parameters|MODEL_CARD_TEMPLATE)",
}


@dataclasses.dataclass
class Name:
    """module: without "trl."; name: "" for the module itself, else one of its names or "Class.member"."""

    module: str
    name: str
    releases: list

    @property
    def key(self):
        return f"{self.module}:{self.name}" if self.name else self.module


def names_of(root):
    """Every (module, name) of the release whose `trl` folder is root."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found.append((module, ""))
        if module in MODULES:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [(module, name) for name in sorted(set(_names(tree.body, is_package)))]
    return found


def _names(body, is_package):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from _public(node.name)
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{member}" for member in _members(node) if not node.name.startswith("_"))
        if isinstance(node, ast.Assign):
            yield from (name for target in node.targets if isinstance(target, ast.Name) for name in _public(target.id))
        if isinstance(node, ast.ImportFrom) and node.level and is_package:
            yield from (name for alias in node.names for name in _public(alias.asname or alias.name))
        if isinstance(node, (ast.If, ast.Try)):
            for part in (node.body, node.orelse, getattr(node, "finalbody", [])):
                yield from _names(part, is_package)


def _public(name):
    return [] if name.startswith("_") and name != "__version__" else [name]


def _members(node):
    for member in node.body:
        if isinstance(member, ast.FunctionDef):
            yield member.name
        elif isinstance(member, ast.AnnAssign):
            yield member.target.id
        elif isinstance(member, ast.Assign):
            yield from (target.id for target in member.targets if isinstance(target, ast.Name))


def is_here(name):
    module = f"ppo_ext.trl.{name.module}".rstrip(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    *classes, last = name.name.split(".")
    for part in classes:
        found = getattr(found, part, None)
    return not last or hasattr(found, last) or last in getattr(found, "__dataclass_fields__", {})


def reason(name):
    """Why it is not here; None if there is no reason in the table."""
    return next((why for why, pattern in ABSENT.items() if re.fullmatch(pattern, name.key)), None)


def row(name):
    here = is_here(name)
    return {
        "module": name.module,
        "name": name.name,
        "releases": name.releases,
        "here": here,
        "reason": None if here else reason(name),
    }


def collect(roots):
    """One Name for each name of any of the releases, {release: its `trl` folder}."""
    releases = {}
    for release, root in roots.items():
        for key in names_of(root):
            releases.setdefault(key, []).append(release)
    return [Name(*key, found) for key, found in sorted(releases.items())]


def download(folder):
    """The wheels of all releases, unpacked; {release: its `trl` folder}."""
    roots = {}
    for release in RELEASES:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "--dest", folder, f"trl=={release}"], check=True)
        (wheel,) = folder.glob(f"trl-{release}-*.whl")
        zipfile.ZipFile(wheel).extractall(folder / release)
        roots[release] = folder / release / "trl"
    return roots


def markdown(rows):
    here = [each for each in rows if each["here"]]
    lines = [
        "# Names of TRL's PPO",
        "",
        f"The modules that hold PPO in TRL {', '.join(RELEASES)}, name by name, with the members of their classes:",
        f"{len(here)} are in `ppo_ext.trl` under the same path, {len(rows) - len(here)} are not, on purpose. Made by",
        "`python -m tests.trl_names --save`.",
        "",
        "## Not here",
        "",
        "| reason | names |",
        "|---|---|",
    ]
    for why in ABSENT:
        keys = [f"{each['module']}:{each['name']}".rstrip(":") for each in rows if each["reason"] == why]
        # a name that a package passes on stands once, and the members of a class that is not here with the class
        short = sorted({key.rpartition(":")[2].split(".")[0] if ":" in key else f"module {key}" for key in keys})
        lines.append(f"| {why} | {', '.join(f'`{name}`' for name in short)} |")
    lines += ["", "## Here", "", "| module | names | only in |", "|---|---|---|"]
    for module in MODULES:
        groups = {}
        for each in here:
            if each["module"] == module and each["name"]:
                groups.setdefault(tuple(each["releases"]), []).append(f"`{each['name']}`")
        for releases, names in sorted(groups.items(), key=lambda group: -len(group[0])):
            only = "" if len(releases) == len(RELEASES) else ", ".join(releases)
            lines.append(f"| `{f'trl.{module}'.rstrip('.')}` | {', '.join(names)} | {only} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.trl_names", description=__doc__)
    parser.add_argument("--save", action="store_true", help="write bench/evidence/trl_names.json and .md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name) for name in collect(download(pathlib.Path(folder)))]
    unexplained = [f"{each['module']}:{each['name']}" for each in rows if not each["here"] and each["reason"] is None]
    print(
        f"{len(rows)} names, {sum(each['here'] for each in rows)} here, {len(unexplained)} neither here nor explained"
    )
    if unexplained:
        print("\n".join(unexplained))
        return 1
    if options.save:
        lines = ",\n".join(json.dumps(each) for each in rows)
        (EVIDENCE / "trl_names.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        (EVIDENCE / "trl_names.md").write_text(markdown(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
