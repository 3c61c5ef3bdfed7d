"""Methods as text, as the command takes them; `fastdiff.spec` reads and writes them."""

from fastdiff.spec import PLAN, field_defaults, format_method, kebab, method_classes, parse_method

__all__ = ["PLAN", "field_defaults", "format_method", "kebab", "method_classes", "parse_method"]
