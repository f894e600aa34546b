"""The programs that exports are made for, asked for their logits in a process of their own.

Each module is run as `python -m forge_plugins.clients.NAME FILE_OR_FOLDER REQUEST ANSWER`: it
imports its client, loads the export, reads `inputs` from REQUEST (safetensors) and writes `logits`
to ANSWER. A process of their own, because clients print, change global settings and may crash.
"""
