"""stub"""
def unavailable() -> str:
    return "not built yet"
def device() -> str:
    return ""
class PyrenderRenderer: ...
