"""A processor that takes rows with and without images, but not in one batch, as some published ones do."""

import families


class FussyProcessor(type(families.llava()[1])):
    def __call__(self, images=None, text=None, **kwargs):
        if images is not None and not all(images):
            raise ValueError("an image for every text, please")
        return super().__call__(images=images, text=text, **kwargs)


def fussy_processor() -> FussyProcessor:
    """LLaVA's, refusing batches of rows with and without images."""
    plain = families.llava()[1]
    return FussyProcessor(
        plain.image_processor,
        plain.tokenizer,
        patch_size=plain.patch_size,
        vision_feature_select_strategy=plain.vision_feature_select_strategy,
        chat_template=plain.chat_template,
        num_additional_image_tokens=plain.num_additional_image_tokens,
    )
