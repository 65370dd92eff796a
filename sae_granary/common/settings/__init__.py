"""One declaration per setting: from a dataclass field to its flag, YAML key, Python keyword and row of the page.

declare.py     `setting(...)`: default, help, unit, range, section, flag; `check` of types and ranges
coerce.py      text or plain values to the declared types
yaml_file.py   files of settings: flat values, each with its line
flags.py       the flags of a command
page.py        the rows of docs/parameters.md
"""
