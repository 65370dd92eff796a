"""Route-matryoshka: route with a matryoshka base. Our definition of the loss: sum of prefix nmse + AuxK."""

from dataclasses import dataclass

from sae_granary.sae_core.options import option
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.route import RouteSAE


@register("route_matryoshka")
class RouteMatryoshkaSAE(RouteSAE):
    """A routed matryoshka."""

    @dataclass(frozen=True)
    class Config(RouteSAE.Config):
        """Options of route_matryoshka."""

        base: str = option("matryoshka", help="Type of the shared SAE.")

    config: Config
