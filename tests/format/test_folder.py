"""What is said of a folder before PEFT is loaded agrees with PEFT."""

from peft.utils import CONFIG_NAME

from s2ft.format.folder import CONFIG_FILE


def test_the_config_is_called_as_peft_calls_it() -> None:
    assert CONFIG_FILE == CONFIG_NAME
