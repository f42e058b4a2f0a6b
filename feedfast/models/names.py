"""Names of the zoo's networks, in a module of their own: a shell that completes them does not wait for torch."""

# What the error for an unknown name shows; any wrn-(6n+4)-k, resnet-(6n+2) and pyramidnet-D-alpha can be built.
ZOO_NAMES = (
    "wrn-16-1", "wrn-16-2", "wrn-16-4", "wrn-28-2", "wrn-28-4", "wrn-28-10", "wrn-40-1", "wrn-40-2",
    "resnet-20", "resnet-32", "resnet-44", "resnet-56", "resnet-110",
    "mobilenetv1", "mobilenetv1-224",
    "pyramidnet-110-84", "pyramidnet-110-270", "pyramidnet-164-270", "pyramidnet-200-240", "pyramidnet-272-200",
    "resnet-50-p25", "resnet-50-p37.5", "resnet-50-p50",
    "fitnet-1", "fitnet-2", "fitnet-3", "fitnet-4",
    "deeplabv3plus-resnet18", "deeplabv3plus-resnet50", "deeplabv3plus-resnet101", "deeplabv3plus-mobilenetv2",
    "ssd300-resnet18", "ssd300-resnet34", "ssd300-resnet50", "ssd300-vgg16",
)  # fmt: skip
