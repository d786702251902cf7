"""Show the defaults of ``DMConfig``'s fields without their help text, for mkdocs.yml."""

from typing import Any

import griffe


class Fields(griffe.Extension):
    """Replace ``_field(default, text)`` by the default."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Change the fields before griffe makes a constructor of them."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_field":
            attr.value = value.arguments[0]
