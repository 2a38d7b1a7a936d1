"""`hf-memtune generate --model M --prompt TEXT`: what a model answers, with reversible adapters that were trained on it, or without.

    hf-memtune generate --model M --reversible_adapters out --prompt "Name three colours." --max_new_tokens 64

A prompt is put to the model as an instruction is in training; with --plain it is continued as it stands.
"""

from dataclasses import dataclass, field
from itertools import takewhile

from hf_memtune.cli.arguments import DataSource, ModelSource
from hf_memtune.cli.essentials import PAGES
from hf_memtune.errors import ConfigError
from hf_memtune.settings.protocol import setting


@dataclass
class Prompts:
    """What to answer, and how."""

    _argument_group_name = "prompts"

    prompt: list[str] = field(default_factory=list, metadata={"help": "Required. Texts to answer, one or more."})
    plain: bool = setting(False, "Continue the texts as they stand, not as instructions.")
    max_new_tokens: int = setting(128, "Most tokens of an answer.")
    temperature: float = setting(0.0, "Temperature of sampling; 0 takes the likeliest token each time.")
    seed: int = setting(0, "Seed of sampling; without effect at temperature 0.")
    use_cache: bool = setting(True, "Keep keys and values of earlier tokens: faster, more memory, the same tokens.")

    def problems(self) -> list[str]:
        checks = [
            (all(text.strip() for text in self.prompt) and self.prompt, "prompt: got nothing, expected one text or more (--prompt TEXT)."),
            (self.max_new_tokens >= 1, f"max_new_tokens: got {self.max_new_tokens}, expected 1 or more."),
            (self.temperature >= 0, f"temperature: got {self.temperature}, expected 0 or more."),
        ]
        return [message for holds, message in checks if not holds]


def run(arguments: list[str]) -> None:
    """Print every prompt and its answer. Raises ConfigError with all problems of the settings, before anything is loaded."""
    from rich.console import Console
    from rich.text import Text

    model, prompts = parse(arguments)
    console = Console(soft_wrap=True)
    for prompt, answer in answers(model, prompts):
        console.print(Text(prompt, style="dim"), Text(answer), "", sep="\n")


def parse(arguments: list[str]) -> tuple[ModelSource, Prompts]:
    """Settings from flags. Raises ConfigError with every problem."""
    from hf_memtune.cli.settings import Parser, build, values_of

    page = PAGES["generate"]
    parser = Parser([Prompts, ModelSource], usage=f"hf-memtune generate {page.usage}", description=page.about)
    namespace = parser.read(arguments, with_recipe=False)
    problems = parser.problems
    prompts, model = (build(kind, values_of(kind, namespace), problems) for kind in (Prompts, ModelSource))
    if "seed" in parser.given and prompts is not None and not prompts.temperature:
        problems.append("seed: has no effect at temperature 0, where nothing is drawn. Leave it out, or set temperature.")
    if problems:
        raise ConfigError(problems)
    return model, prompts


def answers(source: ModelSource, prompts: Prompts):
    """(prompt, answer) of each, one by one, so that padding plays no part."""
    import torch

    from hf_memtune.cli.model import load_on_device, load_tokenizer

    tokenizer = load_tokenizer(source)
    model = load_on_device(source, DataSource(max_length=1), tokenizer).eval()
    torch.manual_seed(prompts.seed)
    sampling = {"do_sample": True, "temperature": prompts.temperature} if prompts.temperature else {"do_sample": False}
    sampling |= {"eos_token_id": ends_of(tokenizer, model.generation_config.eos_token_id, prompts.plain) or None}
    for prompt in prompts.prompt:
        ids = torch.tensor([_tokens(prompt, prompts.plain, tokenizer)], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": prompts.max_new_tokens, "use_cache": prompts.use_cache}
        found = model.generate(ids, pad_token_id=tokenizer.pad_token_id, **options, **sampling)
        yield prompt, tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()


def ends_of(tokenizer, known: int | list[int] | None, plain: bool = False) -> list[int]:
    """Tokens that end an answer: those of the model, those of the tokenizer, and the special ones with which a template ends what the assistant says.

    A base model that has learned a template knows nothing of its end in its own config.
    """
    from hf_memtune.cli.data import IGNORED, ending_of, instruction_row

    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, *ending_of(tokenizer)[:1]} - {None}
    if not plain and tokenizer.chat_template is not None:
        row = instruction_row({"instruction": "A", "output": "A"}, DataSource(max_length=2**31), tokenizer)
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        said = [label for label in row["labels"] if label != IGNORED]
        after = [*takewhile(lambda label: label in special, reversed(said))]  # those before the answer open it
        ends |= {*after[-1:]} if len(after) < len(said) else set()
    return sorted(ends)


def _tokens(prompt: str, plain: bool, tokenizer) -> list[int]:
    """As in training: what stands before the first labelled token of a row with this instruction."""
    from hf_memtune.cli.data import IGNORED, instruction_row, opened

    if plain:
        return opened(prompt, tokenizer)[0]
    # any answer: it is left out; but one may be a token together with the end of the prompt, and has no label then
    settings = DataSource(max_length=2**31)
    rows = [instruction_row({"instruction": prompt, "output": answer}, settings, tokenizer) for answer in "A.1"]
    row = max(rows, key=lambda row: sum(label != IGNORED for label in row["labels"]))
    return row["input_ids"][: next(number for number, label in enumerate(row["labels"]) if label != IGNORED)]
