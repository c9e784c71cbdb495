"""``adapter_config.json``, read with types. A wrong type is an error that names the field.

A config remembers which of its fields were read. Of the others, the fields named here matter only
for training or initialisation, and null, false or empty fields say nothing. ``check_fields``
refuses any other field, because it may change what the adapter computes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import regex

from loraplex_adapter_store.errors import MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.limits import StoreLimits

from .safetensors_reader import parse_json_object

_MAX_PATTERN = 2000  # characters
_BUDGET_S = 2.0  # for all matches of one adapter
_IGNORED = frozenset(
    {
        # provenance
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type"),
        *("peft_version", "revision", "runtime_config", "task_type", "id2label", "label2id"),
        # schedules, losses, memory
        *("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit"),
        *("total_step", "velora_config", "progressbar"),
        *("cpt_mask", "cpt_token_ids", "cpt_tokens_type_mask"),
        *("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"),
        *("opt_weighted_loss_type", "num_frozen_tokens"),
        *("jitter_noise", "router_aux_loss_coef", "router_init_range", "router_loss"),
        *("router_z_loss_coef", "expert_capacity", "blc_alpha", "blc_weight"),
        # the start of trained values; init_lora_weights says what it did to the base
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
        *("d_initial", "delora_lambda", "prompt_tuning_init", "prompt_tuning_init_task"),
        *("prompt_tuning_init_text", "prompt_tuning_init_state_dict_path", "tokenizer_kwargs"),
        *("tokenizer_name_or_path", "encoder_hidden_size", "encoder_num_layers"),
        *("encoder_reparameterization_type", "prefix_projection"),
        # random in training, and read from the file here
        *("projection_prng_key", "projection_seed", "proj_seed", "random_seed"),
        *("save_projection", "sparse", "very_sparse", "sparse_rate", "regularization_alpha"),
        *("mask_type",),
        # sizes that the tensors show
        *("r", "rank_pattern", "mini_r", "u", "weight_tying", "effective_rank", "gralora_k"),
        *("hybrid_r", "num_vectors", "vector_length", "theta_d_length"),
        *("block_size", "block_size_pattern", "decompose_both", "decompose_factor"),
        *("boft_block_num", "boft_block_size", "boft_n_butterfly_factor", "oft_block_size"),
        *("n_frequency", "n_frequency_pattern", "proportional_parameters", "sparsity"),
        *("num_attention_heads", "num_layers", "token_dim"),
        # cancels out: PEFT divides the base's singular values by it
        "psoft_alpha",
        # the base says how its weights are stored
        *("fan_in_fan_out", "use_effective_conv2d"),
        # options of features that are refused
        *("megatron_core", "qalora_group_size"),
        # left by trainers: ms-swift, Unsloth, old PEFT
        *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights", "unsloth_fixed"),
    }
)


class BoundedRegex:
    """Bounds the time of one adapter's regular expressions. Raises MalformedFile once it is spent.

    The package ``regex``, unlike ``re``, has a timeout and releases the interpreter lock.
    """

    def __init__(self) -> None:
        self._left_s = _BUDGET_S

    def match(self, pattern: str, name: str) -> regex.Match[str] | None:
        """``re.match``. Raises MalformedFile if the pattern is too long, broken or too slow."""
        if len(pattern) > _MAX_PATTERN:
            raise MalformedFile(
                f"adapter_config.json: pattern {pattern[:80]!r}… has {len(pattern)} characters, "
                f"at most {_MAX_PATTERN} are matched"
            )
        started = time.monotonic()
        try:
            return regex.match(pattern, name, timeout=max(self._left_s, 1e-3), concurrent=True)
        except regex.error as error:
            raise MalformedFile(f"adapter_config.json: bad pattern {pattern!r}: {error}") from None
        except TimeoutError:
            raise MalformedFile(
                f"adapter_config.json: pattern {pattern[:80]!r} takes too long to match; "
                "list the modules instead"
            ) from None
        finally:
            self._left_s -= time.monotonic() - started


class AdapterConfig:
    """The decoded JSON of one adapter. Access through ``values`` does not count as reading."""

    def __init__(self, values: Mapping[str, object]) -> None:
        if values.get("auto_map") or values.get("auto_mapping_code"):
            raise UnsupportedAdapter("adapter_config.json asks to run code (auto_map): refused")
        self.values = values
        self.regex = BoundedRegex()  # for every pattern of this config
        self._read: set[str] = set()

    @staticmethod
    def parse(data: bytes, limits: StoreLimits) -> AdapterConfig:
        return AdapterConfig(
            parse_json_object(data, "adapter_config.json", limits.max_config_bytes)
        )

    @property
    def unread(self) -> Mapping[str, object]:
        """The fields that are set but were not read."""
        return {
            key: value
            for key, value in self.values.items()
            if key not in self._read and not (value is None or value is False or _is_empty(value))
        }

    @property
    def peft_type(self) -> str:
        value = self.get("peft_type")
        if not isinstance(value, str):
            raise MalformedFile("adapter_config.json has no peft_type")
        return value.upper()

    def is_set(self, key: str) -> bool:
        """True unless the value is absent, null, false, empty or zero."""
        return bool(self.get(key))

    def get(self, key: str) -> object:
        """Return the value, of any type; None if it is absent or null."""
        self._read.add(key)
        return self.values.get(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def names(self, key: str) -> tuple[str, ...] | str | None:
        """Return a list of strings, one string (a regex, or a shorthand), or None."""
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, dict) and all(isinstance(on, bool) for on in value.values()):
            return tuple(name for name, on in value.items() if on)  # MoE-PEFT's {name: bool}
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a string or a list of strings")
        return tuple(value)

    def name_list(self, key: str) -> tuple[str, ...]:
        """``names``, where one string is one name. Empty if the field is absent."""
        names = self.names(key) or ()
        return (names,) if isinstance(names, str) else names

    def pattern(self, key: str) -> Mapping[str, float]:
        """Return the numbers of ``rank_pattern`` or ``alpha_pattern``, by regex of modules."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(
            isinstance(number, int | float) and not isinstance(number, bool)
            for number in value.values()
        ):
            raise self._wrong(key, "an object of numbers")
        return value

    def section(self, key: str) -> AdapterConfig | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return AdapterConfig(value)

    def overridden_by(self, section: AdapterConfig) -> AdapterConfig:
        """Return this config with the fields of ``section`` in place of its own."""
        merged = AdapterConfig({**self.values, **section.values})
        merged.regex, merged._read = self.regex, self._read
        return merged

    def _wrong(self, key: str, needed: str) -> MalformedFile:
        return MalformedFile(
            f"adapter_config.json: {key} is {self.values.get(key)!r}, {needed} is needed"
        )


def _is_empty(value: object) -> bool:
    return isinstance(value, str | list | dict) and not value


def check_fields(config: AdapterConfig) -> None:
    """Raises UnsupportedAdapter with the fields that the reader did not read."""
    unknown = {
        key: value
        for key, value in sorted(config.unread.items())
        if key not in _IGNORED and not _is_of_training(key, value)
    }
    if unknown:
        raise UnsupportedAdapter(
            f"adapter_config.json: no reader of {config.peft_type} acts on {', '.join(unknown)}; "
            "it may change what the adapter computes. Remove it if it concerns training only",
            [f"{key}: {str(value)[:80]}" for key, value in unknown.items()],
        )


def _is_of_training(key: str, value: object) -> bool:
    """True for dropout and unnamed initialisations. A named initialisation may change the base."""
    if key.endswith("_dropout"):
        return True
    return key.startswith("init_") and isinstance(value, bool | int | float)
