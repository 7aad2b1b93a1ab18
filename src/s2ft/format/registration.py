"""S²FT as a PEFT type, from outside PEFT.

PEFT has no plug-in mechanism: `peft.utils.register_peft_method` fills its tables, but only for a member of the enum
`PeftType`. So the enum gets one more member, and whatever looks a method up by its type finds S²FT (`get_peft_model`,
`PeftModel.from_pretrained`, transformers' `load_adapter`, the key `peft_type` in an adapter's config).
"""

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from s2ft.format.terms import METHOD

PREFIX = "s2ft_"  # of parameter names; transformers tells an adapter's keys by it


def peft_type() -> PeftType:
    """The member `PeftType.S2FT`; adds it to the enum on the first call."""
    if METHOD not in PeftType.__members__:
        member: Any = str.__new__(PeftType, METHOD)
        member._name_ = METHOD
        member._value_ = METHOD
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(METHOD)
        PeftType._member_map_[METHOD] = member
        PeftType._value2member_map_[METHOD] = member
        type.__setattr__(PeftType, METHOD, member)
    return PeftType(METHOD)


def register_config(config_cls: type[Any]) -> None:
    """Tells PEFT which class configures S²FT: enough to read an adapter's files."""
    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD.lower(), config_cls=config_cls, model_cls=None, prefix=PREFIX)


def register_tuner(model_cls: type[Any]) -> None:
    """Tells PEFT which class tunes a model by S²FT; the config is registered before."""
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type()] = model_cls
