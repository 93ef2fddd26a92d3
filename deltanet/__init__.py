"""What a student is: its configuration, its model, and the delta rule.

Importing it registers the model type with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained(folder)` loads a converted checkpoint.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deltanet_errors import DeltanetError, Interrupted, UserError

from .config import DeltaNetConfig
from .modeling import DeltaNetForCausalLM, DeltaNetModel, load_student
from .ops import delta_rule

AutoConfig.register(DeltaNetConfig.model_type, DeltaNetConfig)
AutoModel.register(DeltaNetConfig, DeltaNetModel)
AutoModelForCausalLM.register(DeltaNetConfig, DeltaNetForCausalLM)

__version__ = "0.1.0"
__all__ = [
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetModel",
    "DeltanetError",
    "Interrupted",
    "UserError",
    "delta_rule",
    "load_student",
]
