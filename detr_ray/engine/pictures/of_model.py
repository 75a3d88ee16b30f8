"""Pictures of a trained model at work on validation images: attention, position embedding, where queries predict."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError
from detr_ray.detector import Detector
from detr_ray.detector.postprocess import postprocess
from detr_ray.engine.context import local_device
from detr_ray.engine.pictures.of_data import row_of_image
from detr_ray.engine.pictures.request import Drawn, PictureRequest
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.validation.evaluation_job import EvaluationJob, prepare_evaluation
from detr_ray.loss import Scores
from detr_ray.model.attention_maps import AttentionMap, AttentionRecord, SamplingPoints, record_attention
from detr_ray.model.position_encoding import LearnedPositionEncoding, SinePositionEncoding
from detr_ray.printable import counted
from detr_ray.structures import Batch, PaddedBatch, to_device
from detr_ray.viz.attention import Attended, Embedding, attention_figure, position_figure
from detr_ray.viz.figure import end_of
from detr_ray.viz.queries import queries_figure

_MOST_POINTS = 9
_MOST_IMAGES_OF_QUERIES = 500


@dataclasses.dataclass(frozen=True)
class Seen:
    """A model's pass over one validation image.

    Attributes:
        job: what was evaluated.
        padded: the image.
        batch: the same, as the model got it.
        attention: what the attention layers were given.
        found: scores, labels and queries of its detections, the best first.
        boxes_xyxy_px: ``[K, 4]`` boxes of the detections, in pixels of the image as the model got it.
    """

    job: EvaluationJob
    padded: PaddedBatch
    batch: Batch
    attention: AttentionRecord
    found: Scores
    boxes_xyxy_px: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        """``[H, W, 3]`` uint8, without padding."""
        height, width = self.padded.sizes[0].tolist()
        return self.padded.images[0].transpose(1, 2, 0)[:height, :width]

    @property
    def frame_px(self) -> tuple[int, int]:
        """Height and width with padding."""
        height, width = self.padded.images.shape[2:]
        return height, width

    def name_of(self, place: int) -> str:
        """Name of a detection's class."""
        label = int(self.found.labels[0, place])
        return self.job.data.label_map.names[label] or f"label {label}"

    @property
    def title(self) -> str:
        """Which image of which checkpoint it is."""
        return f"image {self.padded.image_ids[0]}, {end_of(self.job.checkpoint)}"


def encoder_picture(config: Config, request: PictureRequest, say: Say) -> Drawn:
    """Encoder self-attention from points of an image: those of `--point`, or the centres of what is detected."""
    seen = _see(config, request, say)
    if not seen.attention.encoder:
        raise ConfigError(
            f"eval.checkpoint: the model of {seen.job.checkpoint} has no encoder layer (model.encoder_layers=0), so "
            "there is no encoder attention to show; `show decoder` shows the decoder's"
        )
    layer = _layer(request, len(seen.attention.encoder), "encoder")
    points = request.points or _centres(seen, request)
    attended = []
    for x, y in points:
        cell = _cell_at(seen, x, y)
        scaled = _scaled(seen, x, y)
        one = seen.attention.of_encoder(layer, 0, [cell])
        attended.append(_attended(seen, one, f"from ({x:.0f}, {y:.0f})", scaled))
    title = f"Encoder self-attention, layer {layer + 1} of {len(seen.attention.encoder)}; {seen.title}"
    return Drawn(attention_figure(seen.pixels, seen.frame_px, attended, title), _lines(seen, request))


def decoder_picture(config: Config, request: PictureRequest, say: Say) -> Drawn:
    """Decoder attention of each object that is detected in an image."""
    seen = _see(config, request, say)
    layer = _layer(request, len(seen.attention.decoder), "decoder")
    attended = []
    for place in _shown(seen, request):
        query = int(seen.found.queries[0, place])
        one = seen.attention.of_decoder(layer, 0, [query])
        name, score = seen.name_of(place), float(seen.found.scores[0, place])
        base = _attended(seen, one, f"{name} {score:.2f}, query {query}", None)
        attended.append(
            dataclasses.replace(
                base, box_xyxy_px=seen.boxes_xyxy_px[place], name=name, label=int(seen.found.labels[0, place])
            )
        )
    title = f"Decoder attention, layer {layer + 1} of {len(seen.attention.decoder)}; {seen.title}"
    return Drawn(attention_figure(seen.pixels, seen.frame_px, attended, title), _lines(seen, request))


def position_picture(config: Config, request: PictureRequest, say: Say) -> Drawn:
    """The position embedding of the first map, for the size of an image and the padding of its batch."""
    job = prepare_evaluation(config, say)
    model = job.build_detector().model
    padded = _load(job, request)
    batch = to_device(padded, torch.device("cpu"), model.pixels)
    with torch.no_grad():
        level = model.get_submodule("backbone.0")(batch.images, batch.mask)[0]
        encoding = model.get_submodule("backbone.1")
        assert isinstance(encoding, SinePositionEncoding | LearnedPositionEncoding)
        vectors = encoding(level.features, level.padding)
    padding = torch.zeros(vectors.shape[1:3], dtype=torch.bool) if level.padding is None else level.padding[0]
    height, width, dim = vectors.shape[1:]
    title = f"Position embedding of a map of {width} x {height} cells, {dim} channels; {end_of(job.checkpoint)}"
    embedding = Embedding(vectors[0].float().numpy(), padding.numpy(), encoding.HALVES)
    return Drawn(position_figure(embedding, title))


def queries_picture(config: Config, request: PictureRequest, say: Say) -> Drawn:
    """Box centres of the queries over the validation set, those of the most confident queries first."""
    job = prepare_evaluation(config, say)
    detector = job.build_detector()
    boxes, scores = _predictions(job, detector)
    used = scores.mean(axis=0)
    queries = np.argsort(-used, kind="stable")[: request.images]
    often = (scores >= 0.5).mean(axis=0)
    lines = [
        f"query {query}: mean score {used[query]:.3f}, at least 0.5 in {often[query]:.0%} of the images"
        for query in queries.tolist()
    ]
    count = scores.shape[1]
    title = f"Centres of the boxes that {len(queries)} of {count} queries predict in {counted(len(boxes), 'image')}, "
    title += "one square a query; "
    if _chooses_queries(detector):
        title += "query 0 begins with the encoder's best proposal, query 1 with the next; "
    title += end_of(job.checkpoint)
    return Drawn(queries_figure(boxes, queries, title), lines)


def _see(config: Config, request: PictureRequest, say: Say) -> Seen:
    job = prepare_evaluation(config, say)
    detector = job.build_detector()
    padded = _load(job, request)
    batch = to_device(padded, torch.device("cpu"), detector.model.pixels)
    attention = record_attention(detector.model, batch.images, batch.mask)
    sizes = torch.from_numpy(padded.sizes.astype(np.int64))
    limit = job.data.config.eval.max_detections
    found = detector.criterion.class_loss.scores(attention.output["pred_logits"].float(), limit)
    order = found.scores.argsort(dim=1, descending=True, stable=True)
    boxes = postprocess(attention.output, sizes, detector.criterion.class_loss, limit)[0]["boxes"]
    sorted_found = Scores(*(part.take_along_dim(order, dim=1) for part in found))
    return Seen(job, padded, batch, attention, sorted_found, boxes[order[0]].numpy())


def _load(job: EvaluationJob, request: PictureRequest) -> PaddedBatch:
    """The requested validation image; without a request, the first."""
    index = job.data.val
    assert index is not None
    row = 0 if request.image is None else row_of_image(index, request.image)
    sample = next(sample for batch in job.data.plan(1, 0).evaluation for sample in batch if sample.index == row)
    loader = job.data.loaders()[1]
    assert loader is not None
    padded = loader.load([sample])
    if padded.bad_images:
        raise ConfigError(f"--image: {padded.bad_images[0]}")
    return padded


def _layer(request: PictureRequest, count: int, part: str) -> int:
    """The layer to draw, from 0."""
    layer = count if request.layer is None else request.layer
    if not 1 <= layer <= count:
        raise ConfigError(f"--layer: the {part} has layers 1 to {count}, not {layer}")
    return layer - 1


def _shown(seen: Seen, request: PictureRequest) -> list[int]:
    """Places of the detections that are drawn: those with the score, and at least the best one."""
    above = int((seen.found.scores[0] >= request.score).sum())
    return list(range(min(max(above, 1), request.images)))


def _lines(seen: Seen, request: PictureRequest) -> list[str]:
    best = float(seen.found.scores[0, 0])
    if best < request.score:
        return [f"no detection has a score of {request.score}; the best one has {best:.3f} (--score)"]
    return []


def _centres(seen: Seen, request: PictureRequest) -> list[tuple[float, float]]:
    """Centres of the drawn detections, in pixels of the stored image."""
    stored, own = seen.padded.orig_sizes[0], seen.padded.sizes[0]
    boxes = seen.boxes_xyxy_px[_shown(seen, request)[:_MOST_POINTS]]
    scale = np.array([stored[1] / own[1], stored[0] / own[0]])
    return [tuple(point) for point in ((boxes[:, :2] + boxes[:, 2:]) / 2 * scale).tolist()]


def _scaled(seen: Seen, x: float, y: float) -> tuple[float, float]:
    """A point of the stored image in pixels of the image as the model got it."""
    stored, own = seen.padded.orig_sizes[0], seen.padded.sizes[0]
    if not (0 <= x < stored[1] and 0 <= y < stored[0]):
        raise ConfigError(f"--point: ({x:g}, {y:g}) is outside of the image of {stored[1]} x {stored[0]} pixels")
    return float(x * own[1] / stored[1]), float(y * own[0] / stored[0])


def _cell_at(seen: Seen, x: float, y: float) -> int:
    """The number of the first map's cell that shows a point of the stored image."""
    scaled_x, scaled_y = _scaled(seen, x, y)
    height, width = seen.attention.map_sizes[0]
    row = int(scaled_y / seen.frame_px[0] * height)
    column = int(scaled_x / seen.frame_px[1] * width)
    return min(row, height - 1) * width + min(column, width - 1)


def _attended(
    seen: Seen, one: AttentionMap | SamplingPoints, title: str, at_px: tuple[float, float] | None
) -> Attended:
    """Attention of one query, the mean of its heads; of a deformable one all points of all heads."""
    if isinstance(one, AttentionMap):
        return Attended(title, one.weights[:, 0].mean(0).numpy(), at_px=at_px)
    frame = torch.tensor([seen.frame_px[1], seen.frame_px[0]])
    heads, maps, points = one.weights.shape[1:]
    levels = torch.arange(maps)[None, :, None].expand(heads, maps, points)
    if at_px is None:
        x, y = (one.references[0] * frame).tolist()
        at_px = (x, y)
    return Attended(
        title,
        one.weights[0].flatten().numpy(),
        (one.locations[0].flatten(0, 2) * frame).numpy(),
        levels.flatten().numpy(),
        at_px,
    )


def _chooses_queries(detector: Detector) -> bool:
    """Whether queries are proposals of the encoder (two stages, DINO): then a query has no place of its own."""
    return any(name.endswith("enc_output") for name, _ in detector.model.named_modules())


@torch.no_grad()
def _predictions(job: EvaluationJob, detector: Detector) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ``[N, Q, 4]`` and best scores ``[N, Q]`` of every query in the first images of the validation set."""
    device = torch.device(local_device(job.data.config.train.use_gpu))
    model = detector.model.eval().to(device)
    source = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    boxes: list[Tensor] = []
    scores: list[Tensor] = []
    seen = 0
    for padded in source.evaluation_batches():
        batch = to_device(padded, device, model.pixels)
        output = model(batch.images, batch.mask)
        boxes.append(output["pred_boxes"].cpu())
        scores.append(_query_scores(output["pred_logits"], model.weight_names.has_no_object).cpu())
        seen += len(padded.images)
        if seen >= _MOST_IMAGES_OF_QUERIES:
            break
    return torch.cat(boxes).numpy(), torch.cat(scores).numpy()


def _query_scores(logits: Tensor, has_no_object: bool) -> Tensor:
    """``[B, Q]`` score of the best class of each query."""
    if has_no_object:
        return logits.softmax(-1)[..., :-1].amax(-1)
    return logits.sigmoid().amax(-1)
