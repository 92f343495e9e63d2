"""Speed, memory and disk of `prepare`, and of what a training reads of it: `python -m benchmarks.data`.

Beside it, in turns, `datasets.map` with the same tokenizer, files and number of processes: it reads,
tokenizes and writes Arrow, and does nothing of the rest (hashes, splits, duplicates, bytes of tokens, quotas,
order). Each measurement has a process of its own, whose memory is that of all its processes: the sum of their
proportional set sizes, looked at ten times a second. Times are of the step alone, once its modules are
imported, but those of our workers are in it. `--corpus MEGABYTES` prepares one large corpus instead; the exit
code is 1 where that takes more than the memory that it may.
"""

# Workers import this file again: what is large is imported where it is needed.
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

SPAWN = multiprocessing.get_context("spawn")
BUILDERS = {"jsonl": "json", "parquet": "parquet"}
VOCABULARY = 32_768
TOKENIZER_BYTES = 8_000_000  # of text that it is trained on
BLOCK = 1024
MOST_MEMORY = 1.5e9  # bytes, of a corpus of 10⁹ tokens
LARGE_FILE = 256_000_000  # bytes of text in each file of a large corpus
LONG_TEXT, SHORT_TEXTS = 54_000_000, 400  # bytes of the one long document; number of others
STEPS, FAR = 60, 10**6  # training steps that are timed; the step that is sought
Facts = dict[str, Any]


@dataclass
class Measured:
    """What a process came to.

    Attributes:
        facts: what it returned.
        memory: bytes of all its processes, at their peak.
        work: bytes of the hidden folder of unfinished data, at its largest.
    """

    facts: Facts
    memory: int
    work: int


def measured(place: Path, work: Callable[..., Facts], *arguments: Any) -> Measured:
    """Do some work in a new process, in the empty folder `place`, which is its first argument."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_report, args=(sender, work, place, *arguments))
    process.start()
    sender.close()
    memory = disk = 0
    while not receiver.poll(0.1):
        memory, disk = max(memory, _memory_of(process.pid)), max(disk, _size_of(place.glob(".*.shards")))
    try:
        return Measured(receiver.recv(), memory, disk)
    except EOFError:
        sys.exit(f"{work.__name__} has failed")
    finally:
        process.join()


def _report(sender: Any, work: Callable[..., Facts], *arguments: Any) -> None:
    sender.send(work(*arguments))


def _memory_of(pid: int | None) -> int:
    """Bytes of a process and all that it began; what several share is counted once."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                used = process.memory_full_info()
                total += getattr(used, "pss", used.rss)
    return total


def _size_of(folders: Iterator[Path]) -> int:
    total = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):  # which passes over what is gone, as Path.rglob does not
            for name in names:
                with suppress(FileNotFoundError):
                    total += Path(parent, name).stat().st_size
    return total


def with_prepare(place: Path, files: Sequence[Path], format: str, tokenizer: Path, processes: int) -> Facts:
    """Prepare some files; seconds, tokens and the account."""
    # Not above: the processes that read shards need nothing of it.
    from dynamic_transformers.configure import settings_from_dict
    from dynamic_transformers.data.prepare import prepare

    source = {"name": "text", "path": BUILDERS[format], "data_files": [str(file) for file in files]}
    settings = settings_from_dict(
        {
            "run": {"name": "bench", "output_dir": str(place)},
            "data": {
                "dataset_configs": [source],
                "tokenizer_name": str(tokenizer),
                "block_size": BLOCK,
                "processes": processes,
            },
            "training": {"max_steps": 1},  # none are made
        }
    )
    start = time.perf_counter()
    folder = prepare(settings, place / "data")
    seconds = time.perf_counter() - start
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (account,), splits = manifest["sources"], manifest["splits"]
    return {
        "seconds": seconds,
        "account": account,
        "tokens": sum(split["tokens"] for split in splits.values()),
        "bytes": _size_of(folder / split for split in splits),
    }


def with_datasets(place: Path, files: Sequence[Path], format: str, tokenizer: Path, processes: int) -> Facts:
    """Tokenize the same files with `datasets`; seconds of it all, and of `map`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as it is in our workers: processes, not threads
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    encode = AutoTokenizer.from_pretrained(tokenizer)

    def tokenized(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": encode(batch["text"], return_attention_mask=False)["input_ids"]}

    start = time.perf_counter()
    names = [str(file) for file in files]
    rows = load_dataset(
        BUILDERS[format], data_files=names, split="train", cache_dir=str(place), num_proc=processes
    )
    read = time.perf_counter()
    rows.map(tokenized, batched=True, num_proc=processes, remove_columns=rows.column_names)
    end = time.perf_counter()
    return {"seconds": end - start, "map_seconds": end - read}


def with_training(place: Path) -> Facts:
    """Train at quickstart's size; for each step, seconds of the step and of its wait for a batch."""
    from dynamic_transformers.configure import compose_settings
    from dynamic_transformers.data.prepare import prepare
    from dynamic_transformers.study import single_run
    from dynamic_transformers.training.batches import training_batches
    from dynamic_transformers.training.run_folder import run_identity
    from dynamic_transformers.training.state import fresh_state
    from dynamic_transformers.training.step import OptimizerStep
    from dynamic_transformers.training.trainer import make_accelerator

    settings = single_run(compose_settings("quickstart", ["study.variant=standard"]))
    data_dir = prepare(settings, place / "data")
    accelerator = make_accelerator(settings)
    state = fresh_state(settings, data_dir, run_identity(settings, data_dir), accelerator)
    waits, steps = [], []

    def timed(batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            yield batch

    step = OptimizerStep(
        accelerator,
        state.model,
        state.optimizer,
        timed(training_batches(settings, data_dir, accelerator, 0)),
        settings.training.optimizer,
        settings.training.gradient_accumulation_steps,
        settings.run.seed,
    )
    for number in range(STEPS):
        start = time.perf_counter()
        step(number, STEPS, list)
        steps.append(time.perf_counter() - start)
    start = time.perf_counter()
    next(training_batches(settings, data_dir, accelerator, FAR))
    return {"steps": steps, "waits": waits, "seek": time.perf_counter() - start}


def make_tokenizer(place: Path) -> Facts:
    """Train a tokenizer on text of the corpus."""
    from benchmarks.corpus import documents, taken
    from dynamic_transformers.data.tokenization import train_tokenizer

    train_tokenizer(taken(documents(), TOKENIZER_BYTES), VOCABULARY).save_pretrained(place)
    return {}


class Bench:
    """Where measurements take place, and what they print.

    Args:
        folder: is there; each measurement has a folder in it, which is removed behind it.
        processes: of each step.
    """

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes = folder, processes
        self.tokenizer = folder / "tokenizer"
        measured(self.tokenizer, make_tokenizer)

    @contextmanager
    def corpus(self, megabytes: float, format: str, **options: int) -> Iterator[list[Path]]:
        """Files of a corpus."""
        from benchmarks.corpus import write_corpus

        folder = self.folder / "corpus"
        yield write_corpus(folder, megabytes, format, **options)
        shutil.rmtree(folder)

    def step(self, work: Callable[..., Facts], files: Sequence[Path], format: str) -> Measured:
        """Prepare these files, or tokenize them with `datasets`."""
        place = self.folder / "place"
        place.mkdir()
        result = measured(place, work, files, format, self.tokenizer, self.processes)
        shutil.rmtree(place)
        return result

    def speed(self, megabytes: float, turns: int) -> Table:
        """Tokens/s beside `datasets.map`."""
        table = Table(
            *("files", "MB of text", "processes", "tokens/s, ours", "tokens/s, datasets"),
            *("ratio", "range of turns", "ratio to `map` alone"),
            box=box.MARKDOWN,
        )
        for format in BUILDERS:
            seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "map": []}
            with self.corpus(megabytes, format) as files:
                for turn in range(turns):
                    for work in (with_prepare, with_datasets)[:: 1 if turn % 2 == 0 else -1]:
                        facts = self.step(work, files, format).facts
                        seconds["ours" if work is with_prepare else "theirs"].append(facts["seconds"])
                        if work is with_datasets:
                            seconds["map"].append(facts["map_seconds"])
                        else:
                            tokens = facts["account"]["tokens_in"]
            ratios, of_map = (
                [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]
                for name in ("theirs", "map")
            )
            table.add_row(
                *(format, f"{megabytes:g}", str(self.processes)),
                *(f"{tokens / statistics.median(seconds[name]):,.0f}" for name in ("ours", "theirs")),
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}–{max(ratios):.2f}",
                f"{statistics.median(of_map):.2f}",
            )
        return table

    def sizes(self, megabytes: Sequence[float]) -> Table:
        """Memory and disk at several sizes of a corpus, and at 10⁹ tokens by a straight line."""
        table = Table(
            *("MB of text", "tokens", "peak memory MB", "÷ the smallest's"),
            *("disk bytes/token", "work folder bytes/token"),
            box=box.MARKDOWN,
        )
        tokens, peaks = [], []
        for size in megabytes:
            with self.corpus(size, "jsonl") as files:
                result = self.step(with_prepare, files, "jsonl")
            tokens.append(result.facts["account"]["tokens_in"])
            peaks.append(result.memory / 1e6)
            table.add_row(
                *(f"{size:g}", f"{tokens[-1]:,}", f"{peaks[-1]:.0f}", f"{peaks[-1] / peaks[0]:.3f}"),
                f"{result.facts['bytes'] / result.facts['tokens']:.3f}",
                f"{result.work / tokens[-1]:.2f}",
            )
        line = statistics.linear_regression(tokens, peaks)
        far = line.intercept + line.slope * 1e9
        table.add_row("by extrapolation", f"{10**9:,}", f"{far:.0f}", f"{far / peaks[0]:.3f}", "", "")
        return table

    def long_document(self) -> Table:
        """One document of 54 MB among small ones."""
        from benchmarks.corpus import documents, taken

        file, texts = self.folder / "long.jsonl", documents()
        found = ["\n".join(taken(texts, LONG_TEXT)), *islice(texts, SHORT_TEXTS)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
        result = self.step(with_prepare, [file], "jsonl")
        table = Table("documents", "tokens", "seconds", "peak memory MB", box=box.MARKDOWN)
        table.add_row(
            f"1 of {LONG_TEXT / 1e6:g} MB, {SHORT_TEXTS} small",
            f"{result.facts['account']['tokens_in']:,}",
            f"{result.facts['seconds']:.1f}",
            f"{result.memory / 1e6:.0f}",
        )
        return table

    def loader(self) -> Table:
        """What a training at quickstart's size waits for its batches."""
        place = self.folder / "place"
        place.mkdir()
        facts = measured(place, with_training).facts
        shutil.rmtree(place)
        step, wait = (statistics.median(facts[name][1:]) for name in ("steps", "waits"))
        table = Table(
            *("training step ms", "of it, waiting for a batch ms", "share"),
            *("largest share of a step", "seek to step 10⁶ ms"),
            box=box.MARKDOWN,
        )
        shares = [w / s for w, s in zip(facts["waits"][1:], facts["steps"][1:], strict=True)]
        table.add_row(
            *(f"{1000 * step:.1f}", f"{1000 * wait:.3f}", f"{100 * wait / step:.2f} %"),
            *(f"{100 * max(shares):.2f} %", f"{1000 * facts['seek']:.1f}"),
        )
        return table

    def large(self, megabytes: float) -> tuple[Table, bool]:
        """One large corpus; its table, and whether it stays within the memory that it may take."""
        with self.corpus(megabytes, "jsonl", file_bytes=LARGE_FILE) as files:
            result = self.step(with_prepare, files, "jsonl")
        account, seconds = result.facts["account"], result.facts["seconds"]
        table = Table("of one large corpus", "", box=box.MARKDOWN)
        rows = {
            "MB of text": f"{megabytes:,.0f}",
            "processes": self.processes,
            "seconds": f"{seconds:,.0f}",
            "tokens/s": f"{account['tokens_in'] / seconds:,.0f}",
            "peak memory MB": f"{result.memory / 1e6:,.0f} (bound {MOST_MEMORY / 1e6:,.0f})",
            "disk bytes/token": f"{result.facts['bytes'] / result.facts['tokens']:.3f}",
            "work folder bytes/token": f"{result.work / account['tokens_in']:.2f}",
            **{name: f"{value:,}" for name, value in account.items() if isinstance(value, int)},
        }
        for name, value in rows.items():
            table.add_row(name, str(value))
        return table, result.memory <= MOST_MEMORY


def main() -> None:
    """Measure, print, and write the tables."""
    from dynamic_transformers.data.workers import cores
    from dynamic_transformers.manifest import source_revision

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=float, help="prepare one corpus of so many MB of text, nothing else")
    parser.add_argument(
        "--megabytes", type=float, default=60.0, help="of text, beside datasets (default: 60)"
    )
    parser.add_argument("--turns", type=int, default=3, help="beside datasets, for each format (default: 3)")
    parser.add_argument("--sizes", default="20,60,200", help="MB of text, of which the memory is measured")
    parser.add_argument("--processes", type=int, default=cores(), help="of each step (default: one a core)")
    parser.add_argument("--folder", type=Path, help="where there is space (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=Path("outputs/data.md"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    within = True
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, args.output.open("w") as file:
        consoles = (Console(width=160), Console(file=file, width=200))

        def show(*what: Any) -> None:
            for console in consoles:
                console.print(*what)

        show(f"    python -m benchmarks.data {' '.join(sys.argv[1:])}\n\nCommit {source_revision()}.\n")
        bench = Bench(Path(folder), args.processes)
        if args.corpus:
            table, within = bench.large(args.corpus)
            show(table)
        else:
            show(bench.loader())
            show(bench.long_document())
            show(bench.sizes([float(size) for size in args.sizes.split(",")]))
            show(bench.speed(args.megabytes, args.turns))
    sys.exit(not within)


if __name__ == "__main__":
    main()
