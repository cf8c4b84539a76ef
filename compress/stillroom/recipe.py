"""The recipe: what a user writes, and the one interface to a run.

A recipe names a model, text, a list of stages told apart by `kind`, what to measure, and the gates that the result
must pass. It is frozen and refuses unknown fields, so that a typo is an error and not a default. Every stage reads the
result of the stage before it unless `source` names another; stages may repeat (prune, distill, prune, distill is
progressive pruning). Nothing here imports torch: reading, checking and planning a recipe stay instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stillroom.errors import InputError
from stillroom.prune.importance.names import DepthMethod, WidthMethod
from stillroom.verdict.gates import parse_gate

RECIPES_DIR = Path(__file__).parent / "recipes"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
"""A name that is also a file name: lower case letters, digits, dot, dash, underscore."""

RESERVED_NAMES = ("dense", "baseline", "final", "import", "text", "verify", "evaluate", "bench", "verdict")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSource(Frozen):
    """Where a model comes from. A bare string in a recipe is its `source`."""

    source: str = Field(min_length=1)
    """A hub id (`Qwen/Qwen3-8B`), a local directory, a `.gguf` file, or the embedded `smollm2-135m`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Pin a commit for a run that can be repeated."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The type that weights are held and written in. `auto`: the checkpoint's own, and bfloat16 for a GGUF file.
    Another than the checkpoint's own makes a converted copy."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class TextSource(Frozen):
    """Where text comes from. A bare string in a recipe is its `source`."""

    source: str = Field(min_length=1)
    """A .txt, .jsonl, .jsonl.gz, .parquet or .arrow file; `hub:NAME` or `hub:NAME:CONFIG`, streamed; `teacher`, text
    that the unpruned model writes itself (no data needed); `python-docs`, the language reference that every CPython
    carries."""
    name: Name | None = None
    """How measurements on this text are called. Default: from the source."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in a blend, relative to the others."""
    field: str = "text"
    """The column of a .jsonl, .parquet or .arrow file, or of a hub dataset. Rows with `messages` go through the chat
    template."""
    split: str = "train"
    """Of a hub dataset."""
    revision: str | None = None
    """Of a hub dataset."""
    tokens: int | None = Field(default=None, ge=64)
    """For `teacher`: how many tokens it writes. For the others: the most to read."""
    temperature: float = Field(default=1.0, gt=0, le=5)
    """For `teacher`: sampling temperature."""
    prompts: TextSource | None = None
    """For `teacher`: it answers these documents, each a user's message or a conversation up to its last one, in order
    and again from the first. Default: it writes the messages too, or starts from nothing where it has no chat
    template."""
    continues: TextSource | None = None
    """For `teacher`: it continues the first tokens of these documents instead."""
    first_tokens: int = Field(default=32, ge=1, le=256)
    """Of each document in `continues`."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _teacher_says_how_much(self) -> TextSource:
        if self.source == "teacher" and self.tokens is None:
            raise ValueError(
                "text source `teacher` needs `tokens`: how many the unpruned model shall write, such as 65536"
            )
        return self

    @model_validator(mode="after")
    def _only_the_teacher_is_given_starts(self) -> TextSource:
        if self.starts is not None and self.source != "teacher":
            raise ValueError(f"`prompts` and `continues` go with text source `teacher`, not {self.source!r}")
        if self.prompts is not None and self.continues is not None:
            raise ValueError("give `prompts` or `continues`, not both; two `teacher` sources may blend them")
        if self.starts is not None and self.starts.source == "teacher":
            raise ValueError("what the teacher starts from cannot be `teacher`; name a file, a hub dataset or leave it")
        return self

    @property
    def starts(self) -> TextSource | None:
        """The documents that the teacher starts from; None: from nothing."""
        return self.prompts or self.continues

    @property
    def label(self) -> str:
        """The given name, or one from the source: `novels` for ./text/novels.jsonl.gz."""
        if self.name:
            return self.name
        stem = self.source.removeprefix("hub:").rsplit("/", 1)[-1].lower()
        for ending in (".gz", ".jsonl", ".txt", ".parquet", ".arrow"):
            stem = stem.removesuffix(ending)
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in stem)


class Data(Frozen):
    """The text of a run. Nothing is measured on `train`, and nothing is chosen or trained on `heldout`."""

    train: tuple[TextSource, ...] = Field(default=(TextSource(source="teacher", tokens=65536),), min_length=1)
    """Text for importance, distillation and calibration: a blend by weight."""
    heldout: tuple[TextSource, ...] = Field(default=(TextSource(source="python-docs"),), min_length=1)
    """Text for verification and perplexity, each source measured by itself."""
    decontaminate: bool = True
    """Leave out documents of `train` that share 13 words in a row with `heldout` or with the local data of a task
    (GPT-3, arXiv 2005.14165, appendix C); what went is counted in the log and in the details of a distill stage."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Data:
        for role, sources in (("train", self.train), ("heldout", self.heldout)):
            labels = [s.label for s in sources]
            if doubled := sorted({label for label in labels if labels.count(label) > 1}):
                raise ValueError(f"data.{role}: two sources are called {doubled[0]!r}; give one of them a `name`")
        return self


class Calibration(Frozen):
    """How much text a stage looks at to choose what to cut or how to scale."""

    samples: int = Field(default=1024, ge=1)
    """Packed sequences."""
    sequence_length: int = Field(default=2048, ge=8)
    """Tokens in each."""
    batch_size: int = Field(default=4, ge=1)
    """Sequences in one forward pass."""


class StageConfig(Frozen):
    name: Name | None = None
    """How the result is called in tables, gates and `source`. Default: the kind, numbered when it repeats."""
    source: str | None = None
    """The stage whose result this one reads (`dense` for the unpruned model). Default: the stage before."""


def _whole_number(value: Any) -> Any:
    """YAML reads `6e9` as text and `6.0e9` as a float; both mean an integer here."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Target(Frozen):
    """What the search for a shape must reach; every target that is given holds at once, for the named load.

    Costs are prune/cost.py's: exact parameters, bytes of weights and KV cache, and a roofline of the hardware.
    """

    params: int | None = Field(default=None, ge=1)
    """At most this many parameters."""
    memory_gb: float | None = Field(default=None, gt=0)
    """At most so many GB (10^9 bytes) on each GPU: weights in `scheme`, and the KV cache of `batch` x `context`
    tokens. What an engine takes beside (activations, graphs) is not in it."""
    latency_ms: float | None = Field(default=None, gt=0)
    """At most so many milliseconds between two output tokens of a sequence."""
    throughput: float | None = Field(default=None, gt=0)
    """At least so many output tokens per second, of all sequences together."""
    hardware: Literal["H100", "H200", "B200", "L40S", "A100", "cpu"] | None = None
    """What serves it; needed for latency_ms and throughput. `cpu` is this machine, measured at the start."""
    batch: int = Field(default=1, ge=1)
    """Sequences decoded together."""
    context: int = Field(default=4096, ge=1)
    """Tokens in each sequence's KV cache."""
    scheme: Literal["none", "fp8", "int8", "nvfp4"] = "none"
    """How the served weights are quantized; `none`: 16 bits."""
    kv_cache: Literal["none", "fp8"] = "none"
    """How keys and values are stored; `none`: in 16 bits."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share the model."""
    measured: Path | None = None
    """A table of speeds measured on the engine at hand, which corrects the roofline (prune/correction.py says how;
    benchmarks/roofline.py writes one)."""
    multiple_of: int | None = Field(default=None, ge=16, multiple_of=16)
    """Widths are multiples of this x tensor_parallel. Default: the largest of 128, 64, 32 and 16 that leaves four
    sizes to choose from."""
    max_cut: float = Field(default=0.5, gt=0, lt=1)
    """The largest share of any one axis that is cut; moderate cuts of several axes lose less than one deep cut."""
    candidates: int = Field(default=12, ge=2)
    """Shapes that are cut, repaired and scored by KL to the dense model, the best pure-depth and the best pure-width
    one among them."""
    rerank: int = Field(default=3, ge=0)
    """So many of the best are distilled for a short while and ranked again; 0 takes the first by KL."""
    rerank_tokens: int = Field(default=1_000_000, ge=1)
    """Distillation tokens for each of those."""

    @field_validator("params", "rerank_tokens", mode="before")
    @classmethod
    def _yaml_writes_6e9(cls, value: Any) -> Any:
        return _whole_number(value)

    @model_validator(mode="after")
    def _says_what_and_where(self) -> Target:
        if not self.given():
            raise ValueError("give at least one of params, memory_gb, latency_ms, throughput")
        speeds = [name for name in ("latency_ms", "throughput") if name in self.given()]
        if speeds and self.hardware is None:
            raise ValueError(f"{' and '.join(speeds)} needs `hardware`: one of H100, H200, B200, L40S, A100, cpu")
        if self.measured is not None and self.hardware is None:
            raise ValueError("`measured` corrects the speed of a `hardware`; name it")
        if self.rerank > self.candidates:
            raise ValueError(f"rerank {self.rerank} is more than the {self.candidates} candidates that are scored")
        return self

    def given(self) -> dict[str, float]:
        """The targets that were given, by name."""
        named = ((name, getattr(self, name)) for name in ("params", "memory_gb", "latency_ms", "throughput"))
        return {name: value for name, value in named if value is not None}


DepthSearch = Literal["search", "greedy", "evolutionary", "leave_one_out_kl", "leave_one_out_loss"]
"""Ways to choose layers that ask the cut model itself."""

RepairKind = Literal["fold", "reconstruct", "refit", "readout"]


class SearchBudget(Frozen):
    """What the search for the layers to keep may cost."""

    tokens: int = Field(default=32768, ge=64)
    """Calibration tokens that every candidate reads."""
    scored_share: float = Field(default=0.25, gt=0, le=1)
    """Share of the positions whose distributions are compared; head and softmax are half the cost of small models."""
    generations: int = Field(default=12, ge=0)
    """Of the evolutionary search, from the best that was found otherwise."""
    offspring: int = Field(default=16, ge=1)
    """Candidates in a generation."""
    finalists: int = Field(default=3, ge=1)
    """So many of the best choices are repaired, and compared again after it."""


class Repair(Frozen):
    """Closed-form repair of the cut model, without training. A bare list of kinds in a recipe is its `kinds`."""

    kinds: tuple[RepairKind, ...] | Literal["auto"] = "auto"
    """`fold`: the map that stands for cut layers, in the down projection before them (ReplaceMe, arXiv 2505.02819).
    `reconstruct`: output and down projection of narrowed layers by ridge regression (SlimGPT, arXiv 2412.18110).
    `refit`: the same of other layers, toward the unpruned model's states. `readout`: where hidden channels went, what
    reads the kept ones. `auto`: all that the model and the cut allow; `[]`: none."""
    tokens: int = Field(default=131072, ge=64)
    """Calibration tokens that the modules are solved on."""
    heldout_tokens: int = Field(default=8192, ge=64)
    """Calibration tokens kept apart, on which each change must lower the KL to the unpruned model or is undone."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"kinds": value} if isinstance(value, list | tuple | str) else value


class Prune(StageConfig):
    """Cut layers (depth) and channels (width) into a smaller model of the same family and of one shape throughout.

    Give sizes, under the names that the model's config uses, or a `target`.
    """

    kind: Literal["prune"] = "prune"
    num_layers: int | None = Field(default=None, ge=1)
    """Layers to keep, chosen by `depth_importance`; of an encoder-decoder, the encoder's."""
    num_decoder_layers: int | None = Field(default=None, ge=1)
    """The same of an encoder-decoder's decoder."""
    drop_layers: tuple[int, ...] | None = None
    """These layers go, counted from 0, instead of a number; a decoder's are counted on from its encoder's."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Channels of the residual stream to keep."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """FFN channels to keep in every layer."""
    num_attention_heads: int | None = Field(default=None, ge=1)
    """Query heads to keep, as many in each KV group."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """KV groups to keep, each with its query heads."""
    num_experts: int | None = Field(default=None, ge=1)
    """Experts to keep in every layer."""
    moe_intermediate_size: int | None = Field(default=None, ge=1)
    """FFN channels to keep in every expert."""
    target: Target | None = None
    """Instead of sizes: what the model must fit or reach. The best shape that does is searched for."""
    depth_importance: Literal["auto"] | DepthSearch | DepthMethod = "auto"
    """How layers are chosen. `search`: by KL to the unpruned model, greedy (SLEB), contiguous and evolutionary
    (EvoPress) candidates, the best few compared after repair; `greedy` and `evolutionary` alone; `leave_one_out_kl` and
    `leave_one_out_loss`, what each layer costs by itself; `block_influence` (ShortGPT), `angular` (one block; Gromov et
    al.), `magnitude`, `taylor`; `random` and `reversed` as controls. `auto`: `search`, and `block_influence` for
    encoders."""
    width_importance: WidthMethod = "l2"
    """How channels, heads and experts are chosen: `l2`, the root mean square of activations; `minitron`, their mean
    size in a sequence, L2 over sequences; or one of the others to compare with. `l2` lost less than `minitron`
    on both models that were measured (docs/benchmarks/pruning.md)."""
    search: SearchBudget = SearchBudget()
    repair: Repair = Repair()
    backend: Literal["stillroom", "megatron"] = "stillroom"
    """`megatron`: ModelOpt's own pruner (mcore_minitron) through Megatron-Bridge, in NVIDIA's NeMo image. What it cut
    is repaired as `repair` says, where the result tells which layers and channels stayed."""
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Prune:
        for number in ("num_layers", "num_decoder_layers"):
            if getattr(self, number) is not None and self.drop_layers is not None:
                raise ValueError(f"give {number} or drop_layers, not both")
        if self.drop_layers is not None and len(set(self.drop_layers)) != len(self.drop_layers):
            raise ValueError(f"drop_layers {list(self.drop_layers)} names a layer twice")
        if self.target is not None and self.sizes():
            raise ValueError(f"give target or sizes ({', '.join(self.sizes())}), not both")
        if self.target is None and not self.sizes():
            raise ValueError(
                "nothing to cut: give num_layers, drop_layers, hidden_size, intermediate_size, num_attention_heads, "
                "num_key_value_heads, num_experts, moe_intermediate_size or target"
            )
        return self

    def sizes(self) -> dict[str, Any]:
        """The sizes that were given, by field."""
        fields = (
            "num_layers",
            "num_decoder_layers",
            "drop_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "num_experts",
            "moe_intermediate_size",
        )
        return {f: v for f in fields if (v := getattr(self, f)) is not None}


Divergence = Literal["forward_kl", "reverse_kl", "skewed_kl", "js"]

TEACHER_SHARE = {"skewed_kl": 0.1, "js": 0.5}
"""Of the mixture, where the recipe does not say: the papers' choices."""


class SampledTeacher(Frozen):
    """Random Sampling KD (arXiv 2503.16870): tokens drawn from the teacher, each with how often it came."""

    kind: Literal["sampled"]
    draws: int = Field(default=50, ge=1, le=255)
    """With replacement, at each position; what comes more than once is stored once."""
    proposal_power: float = Field(default=1.0, gt=0)
    """Draws come from p^power and are weighted by p / p^power over their sum. At 1 the estimate is unbiased, with any
    other power only as `draws` grows."""

    @property
    def most_pairs(self) -> int:
        """Of a token and its weight, at one position."""
        return self.draws

    @property
    def weight_bytes(self) -> int:
        return 1 if self.proposal_power == 1 else 2  # counts, or 65535ths


class TopKTeacher(Frozen):
    """The teacher's likeliest tokens, and all others as one. Biased: nothing is said of how those others differ."""

    kind: Literal["top_k"]
    k: int = Field(default=64, ge=1)

    @property
    def most_pairs(self) -> int:
        """Of a token and its weight, at one position."""
        return self.k

    @property
    def weight_bytes(self) -> int:
        return 2  # 65535ths


def teacher_cache_token_bytes(config: SampledTeacher | TopKTeacher, vocab_size: int) -> int:
    """Of a teacher cache on disk, at most: pairs, their number, the entropy, and the mass outside the k. The index of
    windows and the heads of the shards, below 1%, come on top."""
    pair = (2 if vocab_size <= 1 << 16 else 4) + config.weight_bytes
    return config.most_pairs * pair + (1 if config.most_pairs <= 255 else 4) + (8 if config.kind == "top_k" else 4)


class Distill(StageConfig):
    """Train the student toward the unpruned model's next-token distributions (Hinton et al., arXiv 1503.02531)."""

    kind: Literal["distill"] = "distill"
    tokens: int = Field(ge=1)
    """Training tokens in all; the blend is repeated when it is shorter."""
    sequence_length: int = Field(default=4096, ge=8)
    """Tokens in a packed sequence."""
    batch_size: int = Field(default=768, ge=1)
    """Sequences in an optimizer step."""
    document_masks: bool = True
    """The documents that share a packed sequence do not see each other, and each counts its positions from 0. Off:
    every token sees all before it in the sequence, which is faster, the more the longer the sequence."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences in a forward pass; the rest of the batch is accumulated."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak, after the warmup."""
    min_learning_rate: float = Field(default=1e-5, ge=0)
    """At the end of the cosine."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On matrices only, not on norms and biases."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this L2 norm."""
    loss: Divergence = "forward_kl"
    """Of the teacher's distribution p and the student's q: `forward_kl` KL(p || q), `reverse_kl` KL(q || p)
    (arXiv 2306.08543), `skewed_kl` KL(p || mixture) (arXiv 2402.03898), `js` generalized Jensen-Shannon
    (arXiv 2306.13649)."""
    teacher_share: float | None = Field(default=None, gt=0, lt=1)
    """Of the mixture that `skewed_kl` (alpha; default 0.1) and `js` (beta; default 0.5) compare with; the rest is the
    student's."""
    temperature: float = Field(default=1.0, gt=0)
    """Softens both distributions; the divergence is multiplied by its square, which keeps its gradient's size."""
    ce_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of plain cross-entropy in the loss; the divergence has the rest."""
    ce_balance: Literal["static", "proportional"] = "static"
    """`proportional`: cross-entropy is scaled to the divergence first, by what both were a step before, so that
    `ce_weight` is its share of the loss; 0.5 is ModelOpt's balance."""
    teacher_cache: Annotated[SampledTeacher | TopKTeacher, Field(discriminator="kind")] | None = None
    """The teacher runs once over the text, and training reads a part of what it said from disk, for `forward_kl`.
    It is kept under stillroom's home by content, for other students on the same text. None: the teacher runs in every
    step."""
    chunk_tokens: int = Field(default=1024, ge=1)
    """Tokens whose logits exist at one time, in float32."""
    save_every_steps: int = Field(default=50, ge=1)
    """A killed run loses at most this many steps."""

    @model_validator(mode="after")
    def _options_fit(self) -> Distill:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}; "
                "accumulation would be uneven"
            )
        if self.teacher_share is not None and self.loss not in TEACHER_SHARE:
            raise ValueError(f"teacher_share goes with loss {' or '.join(TEACHER_SHARE)}, not {self.loss}")
        if self.teacher_cache is not None and self.loss != "forward_kl":
            raise ValueError(
                f"teacher_cache holds a part of the teacher's distribution, which loss {self.loss} cannot be computed "
                "from; use forward_kl, or leave teacher_cache out"
            )
        if self.ce_balance == "proportional" and not 0 < self.ce_weight < 1:
            raise ValueError(
                f"ce_balance proportional wants a ce_weight between 0 and 1, not {self.ce_weight:g}; "
                "0.5 weighs both alike"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.tokens < self.batch_size * self.sequence_length:
            raise ValueError(
                f"tokens {self.tokens} make no optimizer step of {self.batch_size} x {self.sequence_length} "
                f"= {self.batch_size * self.sequence_length} tokens; lower batch_size or sequence_length"
            )
        return self

    @property
    def mixture(self) -> float:
        """The teacher's share of what the loss compares with; 0 where that is the student alone."""
        return self.teacher_share if self.teacher_share is not None else TEACHER_SHARE.get(self.loss, 0.0)

    @property
    def num_steps(self) -> int:
        """Whole optimizer steps."""
        return self.tokens // (self.batch_size * self.sequence_length)

    def teacher_cache_bytes(self, vocab_size: int) -> int:
        """On disk, at most; 0 without one."""
        tokens = self.num_steps * self.batch_size * self.sequence_length
        return 0 if self.teacher_cache is None else tokens * teacher_cache_token_bytes(self.teacher_cache, vocab_size)


Scheme = Literal["fp8", "int8", "none"]


class Quantize(StageConfig):
    """Quantize through NVIDIA Model Optimizer and write a checkpoint that stock engines take."""

    kind: Literal["quantize"] = "quantize"
    scheme: Scheme
    """`fp8`: per-tensor E4M3, ModelOpt's unified checkpoint, for vLLM, TensorRT-LLM and SGLang. `int8`: weights per
    channel, activations per token, as compressed-tensors, for vLLM. `none`: the model as it is, made ready to serve."""
    kv_cache: Literal["none", "fp8"] = "none"
    """With `fp8`: calibrated scales for an FP8 KV cache come along."""
    smoothquant: bool = False
    """With `int8`: move activation outliers into the weights first (SmoothQuant, arXiv 2211.10438)."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Modules left alone, by name or wildcard (`model.layers.0.*`)."""
    calibration: Calibration = Calibration(samples=512)

    @model_validator(mode="after")
    def _options_fit_the_scheme(self) -> Quantize:
        if self.kv_cache == "fp8" and self.scheme != "fp8":
            raise ValueError(f"kv_cache fp8 goes with scheme fp8, not {self.scheme}")
        if self.smoothquant and self.scheme != "int8":
            raise ValueError(f"smoothquant goes with scheme int8, not {self.scheme}")
        return self


Stage = Annotated[Prune | Distill | Quantize, Field(discriminator="kind")]


class Task(Frozen):
    """One lm-eval task. A bare string in a recipe is its `name`."""

    name: str = Field(min_length=1)
    """As lm-eval names it: `arc_easy`, `hellaswag`, `mmlu`, `gsm8k`."""
    data: dict[str, str] | None = None
    """Local files by split (`{test: ./arc_easy/test.jsonl}`) in place of the task's hub dataset."""
    limit: int | None = Field(default=None, ge=1)
    """Only this many questions; the standard error says what that costs."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Default: the task's own."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Evaluate(Frozen):
    """Quality, of every artifact and baseline."""

    perplexity_tokens: int = Field(default=65536, ge=64)
    """Tokens of each held-out text."""
    sequence_length: int = Field(default=2048, ge=8)
    """Tokens in a window; windows do not overlap."""
    tasks: tuple[Task, ...] = ()
    batch_size: int = Field(default=8, ge=1)


class Verify(Frozen):
    """What an exported checkpoint, opened again from disk, must keep of the model it was quantized from."""

    tokens: int = Field(default=4096, ge=64)
    """Held-out tokens to compare on."""
    sequence_length: int = Field(default=512, ge=8)
    max_kl: float = Field(default=0.5, gt=0)
    """Nats per token, KL(source || exported)."""
    min_top1_agreement: float = Field(default=0.7, ge=0, le=1)
    """Share of positions where both put the same token first."""


class Bench(Frozen):
    """Throughput and latency of the served models, dense and compressed by the same code in the same run."""

    engine: Literal["auto", "vllm", "transformers", "tensorrt-llm"] = "auto"
    """`auto`: vLLM where it is installed, else transformers."""
    variants: tuple[str, ...] | None = None
    """What to serve: `dense`, `final`, stage names, `baseline:NAME`. Default: dense, the last stage and the
    baselines."""
    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4, 16), min_length=1)
    """Requests in flight, one level after the other."""
    requests_per_stream: int = Field(default=4, ge=1)
    """A level sends this many requests for each stream, and at least 8."""
    prompt_tokens: int = Field(default=512, ge=1)
    output_tokens: int = Field(default=128, ge=1)
    max_model_len: int = Field(default=4096, ge=16)
    """Context that the engine is started with, in tokens."""
    startup_timeout_s: int = Field(default=900, ge=1)

    @model_validator(mode="after")
    def _fits_the_context(self) -> Bench:
        if self.prompt_tokens + self.output_tokens > self.max_model_len:
            raise ValueError(
                f"prompt_tokens {self.prompt_tokens} + output_tokens {self.output_tokens} exceed max_model_len "
                f"{self.max_model_len}"
            )
        return self


class Recipe(Frozen):
    """A whole run: model, text, stages, measurements, gates."""

    name: Name
    description: str = ""
    model: ModelSource
    baselines: dict[Name, ModelSource] = {}
    """Models to compare with, such as the smaller sibling; measured, not compressed."""
    data: Data = Data()
    stages: tuple[Stage, ...] = Field(min_length=1)
    verify: Verify = Verify()
    evaluate: Evaluate | None = Evaluate()
    bench: Bench | None = Bench()
    gates: tuple[str, ...] = ()
    """Conditions on the final stage: `quality.heldout.perplexity <= 1.2 * dense`, `speed.output_tok_s >= 1.3 *
    dense`."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        seen: list[str] = []
        for name, stage in self.named_stages():
            if name in RESERVED_NAMES or name.startswith("baseline"):
                raise ValueError(f"stage name {name!r} is taken by stillroom; choose another")
            if name in seen:
                raise ValueError(f"two stages are called {name!r}; give each its own `name`")
            if stage.source is not None and stage.source not in ("dense", *seen):
                raise ValueError(
                    f"stage {name!r} reads {stage.source!r}, which is no stage before it; "
                    f"allowed: {', '.join(('dense', *seen))}"
                )
            seen.append(name)
        variants = self.variants()
        for wanted in self.bench.variants if self.bench and self.bench.variants else ():
            if wanted not in (*variants, "final"):
                raise ValueError(f"bench.variants names {wanted!r}; allowed: {', '.join(variants)}, final")
        for gate in self.gates:
            if (reference := parse_gate(gate).reference) not in (None, *variants):
                raise ValueError(f"gate {gate!r} compares with {reference!r}; allowed: {', '.join(variants)}")
        return self

    def named_stages(self) -> list[tuple[str, Prune | Distill | Quantize]]:
        """Each stage with its name: given, or its kind, numbered from the second on (prune, prune-2)."""
        named: list[tuple[str, Prune | Distill | Quantize]] = []
        counts: dict[str, int] = {}
        for stage in self.stages:
            counts[stage.kind] = counts.get(stage.kind, 0) + 1
            number = counts[stage.kind]
            named.append((stage.name or (stage.kind if number == 1 else f"{stage.kind}-{number}"), stage))
        return named

    def variants(self) -> tuple[str, ...]:
        """Everything that is measured, in table order: dense, the stages, the baselines."""
        return ("dense", *(name for name, _ in self.named_stages()), *(f"baseline:{name}" for name in self.baselines))

    @property
    def final(self) -> str:
        """The stage that is judged: the last."""
        return self.named_stages()[-1][0]


def shipped_recipes() -> dict[str, Path]:
    """Name and file of each recipe that comes with stillroom."""
    return {path.stem: path for path in sorted(RECIPES_DIR.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The shipped recipe of that name, or the YAML file at that path, with `a.b.0.c=value` overrides.

    Relative paths in a recipe file are taken from the directory that the command runs in.
    Raises InputError when it is not found, not YAML, or not a recipe.
    """
    path = shipped_recipes().get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise InputError(
            f"recipe {name_or_path!r} is neither a file nor a shipped recipe; shipped: {', '.join(shipped_recipes())}"
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"recipe {path} holds no mapping of fields; see `stillroom recipes` for examples")
    raw.setdefault("name", path.stem)
    for override in overrides:
        _set(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data; `where` names it in errors."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"recipe {where}: " + "; ".join(_one_line(detail) for detail in error.errors())) from error


def _one_line(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"]) or "recipe"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = "unknown field"
        if allowed := _fields_beside(detail["loc"]):
            message += f"; allowed here: {', '.join(allowed)}"
        return f"{place}: {message}"
    given = detail.get("input")
    shown = "" if isinstance(given, dict | list | BaseModel) or detail["type"] == "missing" else f" (given: {given!r})"
    return f"{place}: {message}{shown}"


def _fields_beside(location: tuple[int | str, ...]) -> list[str]:
    """The fields allowed where an unknown one stood, found by walking the location through the models."""
    by_name: dict[str, type[BaseModel]] = {
        "model": ModelSource, "data": Data, "train": TextSource, "heldout": TextSource, "prompts": TextSource,
        "continues": TextSource, "prune": Prune,
        "distill": Distill, "quantize": Quantize, "calibration": Calibration, "target": Target, "search": SearchBudget,
        "repair": Repair, "verify": Verify,
        "evaluate": Evaluate, "tasks": Task, "bench": Bench, "baselines": ModelSource,
    }  # fmt: skip
    inner: type[BaseModel] = Recipe
    for part in location[:-1]:
        inner = by_name.get(str(part), inner)
    return list(inner.model_fields)


def _set(raw: dict[str, Any], override: str) -> None:
    """Apply one `a.b.0.c=value`; the value is YAML. Raises InputError when the path leads nowhere."""
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise InputError(f"--set {override!r} has no form a.b=value; for example --set stages.0.num_layers=24")
    keys = path.split(".")
    here: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                raise InputError(
                    f"--set {override!r}: {'.'.join(keys[:depth])} has entries 0 to {len(here) - 1}, no {key!r}"
                )
            index: Any = int(key)
        elif isinstance(here, dict):
            index = key
        else:
            raise InputError(f"--set {override!r}: {'.'.join(keys[:depth])} is {here!r}, which has no fields")
        if last:
            try:
                here[index] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise InputError(f"--set {override!r}: the value is not YAML") from error
        elif isinstance(here, dict):
            here = here.setdefault(index, {})
        else:
            here = here[index]
