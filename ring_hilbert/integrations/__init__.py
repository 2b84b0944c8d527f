# SPDX-License-Identifier: Apache-2.0
"""Integrations with training libraries.

Importing `ring_hilbert` registers `attn_implementation="ring_hilbert"` with Transformers without importing it: registration
waits until somebody does.
"""

import sys

from wrapt import register_post_import_hook

_CONFIGURATIONS = "transformers.configuration_utils"
_HOOKS = {
    _CONFIGURATIONS: "ring_hilbert.integrations.transformers_config:register",
    "transformers.modeling_utils": "ring_hilbert.integrations.transformers:register",
}


def install() -> None:
    """Register with each library now if it is already imported, else as soon as it is."""
    late = sys.modules.get(_CONFIGURATIONS)
    for module, hook in _HOOKS.items():
        register_post_import_hook(hook, module)
    if late is not None:
        from ring_hilbert.integrations.transformers_config import adopt

        adopt(late)
