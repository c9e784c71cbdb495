"""The parts of adapters that the engine can apply. Plans with other parts are refused at once.

Every field and operator of a plan is applied somewhere; ``test_capabilities`` lists them. What
differs is where: embeddings and experts take fewer fields than linears, and each base has its own
modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, HeadTask, ModulePlan
from loraplex_kernels.formats.layout import MAX_RANK
from loraplex_server.engine.parallel.plan_cut import uncut_parts
from loraplex_server.model.encoder.encoder import Encoder
from loraplex_server.model.layers.tensor_parallel import ShardLayout
from loraplex_server.model.targets import routable_modules
from loraplex_server.model.trunk import Trunk
from loraplex_server.model.vision.layouts import Sight

_EMBEDDING_FIELDS = frozenset({"a", "b"})
_EXPERT_FIELDS = frozenset({"a", "b", "out_scale", "bias"})
_HEAD_TASKS = (HeadTask.SEQ_CLS, HeadTask.TOKEN_CLS)


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """The modules of one base that adapters may change, by the base's own names."""

    linears: frozenset[str]
    embeddings: frozenset[str]
    norms: frozenset[str]
    stacked: frozenset[str]  # parameters with stacked experts, and routers' weights
    routable: frozenset[str]  # MLP blocks and projections that may have experts
    input_embedding: str
    output_head: str
    n_layers: int
    max_rank: int = MAX_RANK
    layout: ShardLayout | None = None  # of a base that is cut over several ranks
    sight: Sight = Sight.NONE  # of prompts with images
    is_encoder: bool = False  # it computes whole texts or images without a KV cache
    classifies: bool = True  # False: an encoder whose features are embeddings, as CLIP's
    # Modules before an encoder's classifier that its checkpoint lacks, and classifiers must bring.
    lacking: frozenset[str] = frozenset()

    @staticmethod
    def of(spec: BaseSpec, *, max_rank: int = MAX_RANK) -> EngineCapabilities:
        """Return the capabilities for a base that is not loaded, as ``of_model`` does."""
        return EngineCapabilities(
            linears=frozenset(spec.modules),
            embeddings=frozenset(spec.embeddings),
            norms=_norms_of(spec),
            stacked=_stacked_of(spec),
            routable=routable_modules(spec.model_type, spec.modules) - {spec.output_head},
            input_embedding=spec.input_embedding,
            output_head=spec.output_head,
            n_layers=spec.n_layers,
            max_rank=max_rank,
        )

    @staticmethod
    def of_model(model: Trunk, *, max_rank: int = MAX_RANK) -> EngineCapabilities:
        """Return the capabilities of an engine with this model."""
        of_base = EngineCapabilities.of(model.spec, max_rank=max_rank)
        linears = (name for group in model.groups.values() for name in group.module_names)
        return replace(
            of_base,
            linears=frozenset(linears),
            embeddings=model.embeddings,
            norms=model.norms,
            stacked=model.stacked,
            routable=model.routable,
            layout=None if model.shard is None else model.shard.layout,
            sight=_sight_of(model),
            is_encoder=isinstance(model, Encoder),
            classifies=not isinstance(model, Encoder) or bool(model.spec.classifier),
            lacking=model.lacking if isinstance(model, Encoder) else frozenset(),
        )

    def check(self, plan: AdapterPlan) -> None:
        """Raises UnsupportedAdapter with all unsupported parts, LimitExceeded for a large rank.

        Looks at names and shapes only, which takes microseconds a module. Any thread.
        """
        problems = list(self._problems(plan))
        if problems:
            raise UnsupportedAdapter(
                f"adapter {plan.digest[:12]} has parts that this engine does not apply", problems
            )
        self._check_rank(plan)

    def _check_rank(self, plan: AdapterPlan) -> None:
        experts = (e for block in plan.experts.values() for e in block.experts)
        for modules in (plan.modules, *experts):
            for name, module in modules.items():
                if module.rank > self.max_rank:
                    raise LimitExceeded(
                        f"adapter {plan.digest[:12]} has rank {module.rank} on {name}, this server "
                        f"allows {self.max_rank}; raise --max-lora-rank"
                    )

    def _problems(self, plan: AdapterPlan) -> Iterator[str]:
        for name, module in plan.modules.items():
            if name in self.embeddings and name not in self.linears:
                yield from _unsupported_fields(name, module, _EMBEDDING_FIELDS)
            elif name not in self.linears:
                yield f"{name}: no linear and no embedding of this base"
        for site, experts in plan.experts.items():
            yield from self._expert_problems(site, experts, plan)
        if plan.prefix is not None and len(plan.prefix.keys) not in (0, self.n_layers):
            n = len(plan.prefix.keys)
            yield f"prefix.keys: {n} layers, this base has {self.n_layers}"
        for rows, part, name in (
            (plan.embedding_rows, "embedding_rows", self.input_embedding),
            (plan.head_rows, "head_rows", self.output_head),
        ):
            if rows and name not in self.embeddings and name not in self.linears:
                yield f"{part}: {name or 'no module'} of this base cannot take them"
            if rows and name in plan.modules:
                yield f"{part}: rows and factors on {name}"
        for name in plan.replaced_weights:
            if name not in self.linears and name not in self.embeddings:
                yield f"{name}.weight: no linear and no embedding of this base"
        for name in plan.stacked:
            if name not in self.stacked:
                yield f"{name}: no stacked experts and no router that this engine can change"
        for name in plan.norms:
            if name not in self.norms:
                yield f"{name}: no norm of this base"
        if plan.head is not None and plan.head.task not in _HEAD_TASKS:
            yield f"head: task {plan.head.task!r}"
        if self.sight is Sight.PROMPT and plan.invocation is not None:
            yield "alora_invocation_tokens: this base reads a prompt with images at once"
        if self.is_encoder:
            yield from self._encoder_problems(plan)
        if self.layout is not None:
            yield from uncut_parts(plan, self.layout)

    def _encoder_problems(self, plan: AdapterPlan) -> Iterator[str]:
        if plan.prefix is not None:
            yield "virtual tokens: this base is an encoder, whose texts take none"
        if plan.invocation is not None:
            yield "alora_invocation_tokens: this base is an encoder, which reads a text at once"
        if plan.head is not None and not self.classifies:
            yield "head: this base embeds images and texts, and takes no classifier"
        if plan.head is not None and plan.head.task is HeadTask.SEQ_CLS:
            for name in sorted(self.lacking - plan.replaced_weights.keys() - plan.norms.keys()):
                yield (
                    f"head: the base's checkpoint lacks {name}, which classifiers read; name it in "
                    "modules_to_save when training"
                )

    def _expert_problems(self, site: str, plan: ExpertPlan, whole: AdapterPlan) -> Iterator[str]:
        if site not in self.routable:
            yield f"{site}: no gated MLP or linear to route to experts"
        for index, expert in enumerate(plan.experts):
            for name, module in expert.items():
                if name != site and name.rpartition(".")[0] != site:
                    yield f"{name}: behind the gate of {site}, which does not contain it"
                if name in whole.modules:
                    yield f"{name}: experts and plain factors on one module"
                yield from _unsupported_fields(f"{name} of expert {index}", module, _EXPERT_FIELDS)


def _sight_of(model: Trunk) -> Sight:
    if isinstance(model, Encoder) or model.images is None:
        return Sight.NONE
    return model.images.layout.sight


def _stacked_of(spec: BaseSpec) -> frozenset[str]:
    stacks = {name for name, shape in spec.parameters.items() if len(shape) == 3}
    return frozenset(stacks | {f"{router}.weight" for router in spec.routers})


def _norms_of(spec: BaseSpec) -> frozenset[str]:
    """Return the modules with a vector for a weight that are no linears and no embeddings."""
    names = {
        name.removesuffix(".weight")
        for name, shape in spec.parameters.items()
        if name.endswith(".weight") and len(shape) == 1
    }
    return frozenset(names - spec.modules.keys() - spec.embeddings.keys())


def _unsupported_fields(name: str, module: ModulePlan, supported: frozenset[str]) -> Iterator[str]:
    """Yield the fields of ``module`` that are set and not supported, as ``name.field``."""
    for field in fields(module):
        if field.name not in supported and getattr(module, field.name) is not None:
            yield f"{name}.{field.name}"
