"""Names that the node files share: where the nodes stand in the menus, and the model option that carries what they
describe."""

from __future__ import annotations

CATEGORY = "AR Video"
OPTION = "arva_acceleration"
