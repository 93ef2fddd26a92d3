"""A thin layer over DeepSpeed: the same module, loss and optimizer at ZeRO 0, 1, 2 and 3, on one process or many.

The optimizer is torch's AdamW, always given, never named in DeepSpeed's configuration (which would compile one).
State goes in and out as *whole float32 tensors by parameter name*, so what is saved knows neither the ZeRO stage nor
the number of processes, and comes back bit for bit. The loop that drives it is `loop.py`; tests: test_engine.py.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from deltanet_errors import UserError

from .world import World, own_part, quiet_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGNED = 8  # numbers: 16 bytes in bfloat16, which compiled kernels and vector loads count on


@dataclass(frozen=True)
class EngineSettings:
    """How a stage is sharded. bf16 computes in bfloat16 over float32 master weights, at every ZeRO stage.
    `extra` is merged into DeepSpeed's configuration last."""

    zero_stage: int = 0
    precision: str = "fp32"
    gradient_clipping: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    offload_optimizer: bool = False
    offload_parameters: bool = False
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"zero_stage is {self.zero_stage!r}; allowed: 0, 1, 2, 3")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision is {self.precision!r}; allowed: fp32, bf16")
        if self.offload_optimizer and self.zero_stage == 0:
            raise UserError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise UserError(f"offload_parameters needs zero_stage 3, not {self.zero_stage}")

    @property
    def casts_parameters(self) -> bool:
        """Whether the module's own parameters become bfloat16 (with float32 masters beside them)."""
        return self.precision == "bf16" and self.zero_stage > 0

    def deepspeed_config(self) -> dict:
        """What DeepSpeed is told. This project owns the accumulation: `step` is the boundary."""
        zero: dict = {"stage": self.zero_stage}
        if self.zero_stage:
            zero |= {"overlap_comm": False, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
        if self.zero_stage == 3:
            zero |= {"stage3_param_persistence_threshold": 10_000, "stage3_gather_16bit_weights_on_model_save": False}
        if self.offload_optimizer:
            zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
        if self.offload_parameters:
            zero |= {"offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "steps_per_print": None,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": self.gradient_clipping if self.zero_stage else 0.0,
        }
        if self.casts_parameters:
            config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        return _merged(config, self.extra)


def _merged(base: dict, extra: dict) -> dict:
    """`base` with the keys of `extra` laid over it, mappings merged."""
    both = {key: _merged(base[key], extra[key]) for key in base.keys() & extra.keys() if isinstance(extra[key], dict)}
    return base | extra | both


def _aligned(groups: list[dict], fillers: nn.ParameterList, device: torch.device) -> list[dict]:
    """The groups with a filler, noted in `fillers`, after every parameter whose size is not a multiple of ALIGNED:
    ZeRO 1 and 2 lay a group's parameters end to end in one buffer, where all shall start at 16 bytes."""
    laid = []
    for group in groups:
        parameters = []
        for parameter in group["params"]:
            parameters.append(parameter)
            if missing := -parameter.numel() % ALIGNED:
                fillers.append(nn.Parameter(torch.zeros(missing, dtype=parameter.dtype, device=device)))
                parameters.append(fillers[-1])
        laid.append(group | {"params": parameters})
    return laid


class _GuardedAdamW(torch.optim.AdamW):
    """ZeRO 0's optimizer: clips, and leaves everything as it was where the gradient is not finite.
    (From ZeRO 1 on DeepSpeed does both.) Gradients are the same on every rank, so all decide alike."""

    def __init__(self, groups, clip: float, **options):
        self.clip, self.overflow, self._global_grad_norm = clip, False, 0.0
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"), error_if_nonfinite=False)
        self._global_grad_norm = norm.item()
        self.overflow = not torch.isfinite(norm).item()
        if not self.overflow:
            super().step()


class Engine:
    """A module whose forward returns a share of the loss, its trainable groups, and their optimizer.

    groups: dicts of `params`, `lr`, `weight_decay` (see trainable.py). Parameters outside the groups must not require
    gradients; they are kept as given. The module must live on the CPU or on `world.device` in its master precision.

    source: of a module that is parted already (`sharded.partition`): its tensors as they came, whole, by name.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict],
        settings: EngineSettings,
        world: World,
        source: Callable[[str], torch.Tensor] | None = None,
    ):
        deepspeed = quiet_deepspeed()
        self.settings, self.world, self.module, self.source = settings, world, module, source
        self.names = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # A frozen tensor that bfloat16 would round is remembered as it came, so that it is saved as it came.
        self.frozen = {
            name: p.detach().to("cpu", copy=True)
            for name, p in module.named_parameters()
            if source is None and not p.requires_grad and settings.casts_parameters and p.dtype != torch.bfloat16
        }
        # DeepSpeed (0.19) turns off an autocast that was entered outside of it, and its own is a global of the process.
        self._forward = module.forward
        module.forward = self._computing
        fillers = nn.ParameterList()
        if settings.zero_stage in (1, 2):
            groups = _aligned(groups, fillers, world.device)
            module.register_module("fillers", fillers)  # DeepSpeed trains what the module has, and looks only now
        # fused: torch's default on a GPU holds temporaries as large as all parameters at its peak.
        options = {"betas": settings.betas, "eps": settings.eps, "fused": True}
        if settings.zero_stage:
            optimizer = torch.optim.AdamW(groups, **options)
        else:
            optimizer = _GuardedAdamW(groups, settings.gradient_clipping, **options)
        if source is None and settings.casts_parameters:
            source = self.masters_of(module).__getitem__
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        with contextlib.redirect_stdout(io.StringIO()):  # its BF16_Optimizer prints memory figures
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings.deepspeed_config(), dist_init_required=False
            )
        module._modules.pop("fillers", None)
        for name, value in buffers.items():  # DeepSpeed rounds RoPE's frequencies to bfloat16 too
            buffer = module.get_buffer(name)
            if buffer.dtype != value.dtype:
                buffer.data = value.to(buffer.device)
        self.optimizer = self.deepspeed.optimizer
        self.steps = 0
        if source is not None and settings.casts_parameters:
            self.load_masters(source)

    def masters_of(self, module: nn.Module) -> dict[str, torch.Tensor]:
        return {
            n: p.detach().to("cpu", torch.float32, copy=True) for n, p in module.named_parameters() if n in self.names
        }

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's groups; set `lr` in them before a step."""
        return self.optimizer.param_groups

    def compute(self):
        """The context a forward pass runs in."""
        if self.settings.precision == "bf16" and not self.settings.casts_parameters:
            return torch.autocast(self.world.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _computing(self, *args, **kwargs):
        with self.compute():
            return self._forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        return self.deepspeed(*args, **kwargs)

    def backward(self, share: torch.Tensor) -> None:
        """Accumulates the gradient of this micro-batch's share of the step's loss: the shares of all micro-batches of
        all ranks add up to it. (DeepSpeed averages over ranks; that is undone here.)

        A share that is not finite makes the gradient NaN, so that every rank's step is skipped.
        """
        value = share.detach()
        poison = 1 + (value - value)  # 1, or NaN where the loss is not finite; no waiting for the device
        self.deepspeed.backward(share * poison * self.world.size, scale_wrt_gas=False)

    def step(self) -> tuple[bool, float]:
        """Applies the update on all ranks, or on none where any gradient is not finite. Drops the gradients.

        Returns whether it was applied, and the norm of the gradient before clipping.
        """
        self.deepspeed.step()
        applied = not self.optimizer.overflow
        self.steps += applied
        norm = self.optimizer._global_grad_norm
        return applied, float(norm) if applied else float("nan")

    def full_tensors(self, key: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter (key None: float32 masters, and the frozen ones as they came) or every moment `key` of the
        trained ones, whole, by name, one at a time. All ranks must iterate together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is not None:
            self._link_moments()
        for name, parameter in self.module.named_parameters():
            if name not in self.names:
                if key is None:
                    yield name, self._frozen(name, parameter)
            elif self.settings.zero_stage == 0:
                state = self.optimizer.state[parameter]
                yield name, parameter.detach() if key is None else state.get(key, torch.zeros_like(parameter))
            elif key is None:
                yield name, safe_get_full_fp32_param(parameter)
            else:
                yield name, safe_get_full_optimizer_state(parameter, key)

    def _link_moments(self) -> None:
        """DeepSpeed 0.19 links moments to parameters once, after the first group's first update, when the later
        groups have none yet: link again."""
        if self.settings.zero_stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _frozen(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        if self.source is not None:
            return self.source(name)
        if name in self.frozen:
            return self.frozen[name]
        if self.settings.zero_stage == 3:
            with quiet_deepspeed().zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter.detach()

    def load_masters(self, get: Callable[[str], torch.Tensor]) -> None:
        """Sets every trained parameter, master and working copy, from whole tensors by name."""
        for name, parameter in self.names.items():
            if self.settings.zero_stage == 0:
                parameter.data.copy_(get(name))
            else:
                self._set(parameter, get(name))
        if self.settings.zero_stage == 3:
            self.optimizer._partition_all_parameters()
            for index in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if self.optimizer.persistent_parameters:
                self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)
        elif self.settings.zero_stage:
            self.optimizer.update_lp_params()

    def load_moments(self, get: Callable[[str, str], torch.Tensor], steps: int) -> None:
        """Sets the optimizer's state after `steps` applied updates from whole tensors, `get(name, moment)`."""
        self.steps = steps
        inner = self.optimizer.optimizer if self.settings.zero_stage else self.optimizer
        held = self.optimizer.fp32_partitioned_groups_flat if self.settings.zero_stage == 3 else None
        if held is None:
            held = [p for group in inner.param_groups for p in group["params"]]
        for p in held:
            step = torch.tensor(float(steps), device=p.device)
            inner.state[p] = {"step": step} | {key: torch.zeros_like(p.data) for key in MOMENTS}
        self._link_moments()
        for name, parameter in self.names.items():
            for key in MOMENTS:
                if self.settings.zero_stage == 0:
                    inner.state[parameter][key].copy_(get(name, key))
                else:
                    self._set(parameter, get(name, key), key)

    def _set(self, parameter: nn.Parameter, whole: torch.Tensor, key: str | None = None) -> None:
        """Sets this rank's part of a master (key None) or of the moment `key`, at ZeRO 1 to 3."""
        from deepspeed import utils

        if self.settings.zero_stage == 3:
            # DeepSpeed's own cut of a whole tensor (0.19) fails where it does not divide by the number of ranks.
            value = own_part(whole, self.world).to(self.world.device, torch.float32)
            put, put_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        else:
            value = whole.to(self.world.device, torch.float32)
            put, put_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        put(parameter, value) if key is None else put_moment(parameter, value, key)

    def close(self) -> None:
        """Lets go of DeepSpeed's hooks and buffers; the module itself is not usable for training afterwards."""
        self.deepspeed.destroy()
        self.module.forward = self._forward
        if self.settings.zero_stage == 3:
            _let_go(self.module)


def _let_go(module: nn.Module) -> None:
    """What DeepSpeed 0.19 leaves in memory of a ZeRO 3 engine, masters and moments too: a stack of modules, and the
    cache of a method, hold on to it beyond `destroy`."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK[:] = [other for other in FWD_MODULE_STACK if other is not module]
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
