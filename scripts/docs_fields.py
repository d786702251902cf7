"""For mkdocs.yml: the defaults of ``DMConfig``'s fields without the help text beside them."""

from typing import Any

import griffe


class Fields(griffe.Extension):
    """``_field(default, text)`` -> default."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Before griffe makes a constructor of the fields."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_field":
            attr.value = value.arguments[0]
