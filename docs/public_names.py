"""Print the table of public names in docs/stability.md, from their docstrings."""

import inspect

import timewait

print("| `from timewait import ...` | |")
print("|---|---|")
for name in timewait.__all__:
    value = getattr(timewait, name)
    if name == "__version__":
        about = "The version, as text."
    else:
        paragraph = (inspect.getdoc(value) or "").split("\n\n")[0]
        about = " ".join(paragraph.split())
    print(f"| `{name}` | {about} |")
