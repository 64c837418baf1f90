"""torch.hub entrypoints, one a model: `torch.hub.load('OWNER/tamzoo', 'resnet50_tam', pretrained=True)`."""

dependencies = ["huggingface_hub", "numpy", "safetensors", "timm", "torch", "torchvision"]


def _entrypoints():
    import importlib.util

    missing = [name for name in dependencies if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"tamzoo needs {', '.join(missing)}; pip install {' '.join(missing)}")
    from tamzoo import registry

    def entrypoint(model, doc):
        def create(pretrained=False, tag=None, num_classes=None, **kwargs):
            import timm

            name = registry.find_model(f"{model}.{tag}" if tag else model)
            if num_classes is not None:
                kwargs["num_classes"] = num_classes
            return timm.create_model(name, pretrained=pretrained, **kwargs)

        create.__name__ = create.__qualname__ = model
        create.__module__ = __name__
        create.__doc__ = f"""{doc}
    Args:
        pretrained: Load the trained weights of the tag.
        tag: Data set, for instance "cifar100"; the default is the first that has weights, else cifar100.
        num_classes: In place of the data set's number of classes.
        kwargs: Those of timm.create_model.
    """
        return create

    return {
        model: entrypoint(
            model, f"{backbone.title} with attention {attention!r}, for 32-pixel images or ImageNet's.\n"
        )
        for model, (backbone, attention) in registry.MODELS.items()
    }


globals().update(_entrypoints())
