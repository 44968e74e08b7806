"""Every field, its meaning, its unit and its default. The other configs override a few of them.

Fields that a config has can be set on the command line: `--config.batch_size=256`, and of a quantized one
`--config.weights.bits=3`.
"""

import dataclasses
import typing

import ml_collections

from qflax.quantizers import KINDS


def quantizer(kind: str, **fields) -> ml_collections.ConfigDict:
    """A quantizer for `weights` or `activations`: all fields of the spec of that kind, in qflax/quantizers,
    so that each can be changed on the command line.
    """
    spec = ml_collections.ConfigDict({"kind": kind})
    types = typing.get_type_hints(KINDS[kind])
    for name, value in dataclasses.asdict(KINDS[kind](**fields)).items():
        of = next(t for t in (*typing.get_args(types[name]), types[name]) if t is not type(None))
        spec[name] = ml_collections.config_dict.placeholder(of) if value is None else value
    return spec


def uniform(**fields) -> ml_collections.ConfigDict:
    """Integers of a fixed width, see qflax/quantizers/uniform.py."""
    return quantizer("uniform", **fields)


def minifloat(**fields) -> ml_collections.ConfigDict:
    """Floating point eXmY, see qflax/quantizers/minifloat.py."""
    return quantizer("minifloat", **fields)


def mixed_precision(**fields) -> ml_collections.ConfigDict:
    """Integers of a learned width, see qflax/quantizers/mixed_precision.py."""
    return quantizer("mixed_precision", **fields)


def accumulator_aware(**fields) -> ml_collections.ConfigDict:
    """Weights for a narrow accumulator (A2Q, A2Q+), see qflax/quantizers/accumulator_aware.py."""
    return quantizer("accumulator_aware", **fields)


def truncation(**fields) -> ml_collections.ConfigDict:
    """The first bits of integers, see qflax/quantizers/truncation.py."""
    return quantizer("truncation", **fields)


def integer_bias(**fields) -> ml_collections.ConfigDict:
    """Biases on the accumulator's grid, see qflax/quantizers/integer_bias.py."""
    return quantizer("integer_bias", **fields)


def integer_input() -> dict:
    """A rule: the normalised image as integers of 8 bits, the range set by calibration, so that the first
    layer adds integers too. Finer than what an image of 8 bits tells apart.
    """
    spec = dict(kind="uniform", bits=8, signed=True, scale="static", statistic="absmax")
    return dict(layers="input", activations=spec)


def get_config() -> ml_collections.ConfigDict:
    """Returns the default configuration: a float ResNet-20 on CIFAR-10."""
    config = ml_collections.ConfigDict()

    # Network.
    # resnet8, 20, 32, 44, 56, 110 (16 to 64 channels), 18, 34, 50 (64 to 512). Or MODULE:NAME of a Flax
    # network of your own: NAME(num_classes=...) makes it, and it is called with images and train=True or
    # False. The next six fields are of the ResNets alone.
    config.model = "resnet20"
    config.stem = "3x3"  # 3x3 for small images, 7x7 with stride 2 and a max pool for those of ImageNet.
    config.shortcut = "A"  # Where the shape changes: A pads with zeros, B is a 1x1 convolution.
    # signed: as in the paper. unsigned: both operands of an addition pass one activation layer before it, so
    # that integer hardware adds codes of one unsigned grid.
    config.residual = "signed"
    # batch, or folded: convolutions have a bias instead, into which the norms of the network that this one
    # starts from are folded.
    config.norm = "batch"
    config.batch_norm_momentum = 0.9  # Weight of the old running statistics.
    config.batch_norm_epsilon = 1e-5
    config.dtype = "float32"  # Of convolutions in training: float32 or bfloat16. Evaluation is float32.

    # Quantization: None is float; else one of the specs above, for instance
    # uniform(bits=4, scale="lsq", granularity="per_channel").
    config.weights = None  # Kernels of convolutions and dense layers.
    config.activations = None  # Outputs of activation functions.
    config.outputs = None  # Outputs of convolutions and dense layers.
    config.biases = None  # integer_bias() or float.
    # Exceptions, later ones override earlier ones: mappings with `layers`, a glob pattern on layer paths,
    # and None or changed spec fields for one or several of the above.
    config.rules = ()
    config.calibration_examples = 1024  # Training images from which ranges are set before the first step.
    config.calibration_batch_size = 256  # They come in whole batches of that size.
    # What becomes of the batches' ranges: batches is their mean, ema their running average; set is the range
    # of all images as one batch, in up to three passes, and the first batch once more.
    config.calibration = "batches"

    # Post-training quantization (qflax calibrate), on the same images as calibration.
    config.ptq = ml_collections.ConfigDict()
    # Methods in their order: equalization, ranges, bias_correction, analytic_bias_correction,
    # norm_reestimation; gptq, adaround (learned rounding, layer by layer) or brecq (by blocks, with ranges).
    config.ptq.recipe = ("ranges", "norm_reestimation", "brecq")
    config.ptq.iterations = 500  # Of adaround and brecq, per layer or block.
    config.ptq.batch_size = 32  # Of an iteration.
    config.ptq.learning_rate = 0.01  # Of the choices between the neighbours of a weight (Adam).
    config.ptq.range_learning_rate = 0.001  # Of learned activation ranges, relative to their size (Adam).
    config.ptq.strength = 0.01  # Of the regularizer that makes the choices final.
    config.ptq.drop = 0.5  # brecq: share of activations that stay float in an iteration (QDrop); 0 is off.
    config.ptq.damping = 0.01  # gptq: added to the Hessian's diagonal, relative to its mean.
    config.ptq.report_examples = 2048  # Training images not calibrated on, on which every method is judged.

    # Start from the weights and norm statistics of this workdir's last checkpoint, or of a file of
    # torchvision's (.pth or .safetensors); "" is random.
    config.init_from = ""

    # Data.
    config.dataset = "cifar10"  # cifar10, digits or imagenet2012.
    config.data_dir = ""  # Where TFDS keeps its data sets; "" is $TFDS_DATA_DIR or TFDS's own default.
    config.validation_examples = 0  # Taken from the end of the training images; 0 trains on all of them.
    config.crop = ml_collections.ConfigDict()  # Of photographs (imagenet2012); the others have a size.
    config.crop.image_size = 224  # Side of what the network sees, in pixels.
    config.crop.area = (0.08, 1.0)  # In training: least and largest share of the photograph,
    config.crop.ratio = (3 / 4, 4 / 3)  # and of width to height, of a random crop.
    config.crop.resize = 256  # In evaluation: length of the shorter side before the central crop.
    # Processes that read and decode photographs; -1: one per core, at most 16; 0: threads.
    config.num_workers = -1
    config.mean = (0.4914, 0.4822, 0.4465)  # Subtracted from pixels in [0, 1], per channel.
    config.std = (0.2470, 0.2435, 0.2616)  # Divides them.
    config.augmentation = ml_collections.ConfigDict()
    config.augmentation.crop_padding = 4  # Random crop after padding by so many pixels.
    config.augmentation.flip = True  # Random horizontal flip.
    config.augmentation.cutout = 0  # Side of a square set to the mean colour, in pixels; 0 is off.
    config.augmentation.mixup_alpha = 0.0  # Parameter of the beta distribution; 0 is off.
    config.augmentation.cutmix_alpha = 0.0  # The same for cutmix.

    # Optimization.
    config.batch_size = 128  # Of all devices together.
    config.num_epochs = 160.0
    config.num_train_steps = -1  # -1: num_epochs.
    config.optimizer = "sgd"  # sgd or adam, for the weights.
    config.momentum = 0.9  # Of sgd.
    config.nesterov = True  # Of sgd.
    config.learning_rate = 0.1  # The peak.
    config.schedule = "cosine"  # cosine, onecycle, step or constant.
    config.warmup_epochs = 5.0  # Linear from 0; of onecycle the rising part. It counts in num_epochs.
    config.milestone_epochs = ()  # Where schedule "step" multiplies by milestone_factor.
    config.milestone_factor = 0.1
    config.weight_decay = 2e-4  # Not on biases, norms and quantizers. Of adam decoupled.
    config.gradient_clip = 0.0  # Largest global norm of the gradient; 0 is off.
    # Steps in a row that are skipped because a loss, a gradient or what an update makes of the state is not
    # finite. One more stops the run, with the name of the layer.
    config.skip_bad_steps = 0
    config.loss = "cross_entropy"  # cross_entropy or squared_hinge.
    config.label_smoothing = 0.1
    # Distillation: (1 - weight) * loss + weight * temperature^2 * KL divergence of the teacher's softened
    # predictions on the same augmented images from the network's own.
    config.distillation = ml_collections.ConfigDict()
    config.distillation.teacher = ""  # Workdir of the teacher; "" is off.
    config.distillation.weight = 0.5
    config.distillation.temperature = 4.0
    config.ema_decay = 0.0  # Evaluate an exponential average of the weights; 0 is off.
    config.quantizer_optimizer = "sgd"  # sgd or adam, for scales and ranges.
    config.quantizer_learning_rate = 0.1  # The peak; same schedule.

    # Sizes, with learned widths: strength * relu(size - target)^2 is added to the loss.
    config.size_targets = ml_collections.ConfigDict()  # In KiB; 0 is no target.
    config.size_targets.weight_kib = 0.0  # All weights and biases.
    config.size_targets.activation_kib_sum = 0.0  # All activations of one example.
    config.size_targets.activation_kib_max = 0.0  # The largest of them.
    config.size_strengths = ml_collections.ConfigDict()  # Per KiB^2.
    config.size_strengths.weight_kib = 0.1
    config.size_strengths.activation_kib_sum = 0.1
    config.size_strengths.activation_kib_max = 0.1
    # Whether learned widths start, where the run starts from another, so that the targets hold: each by its
    # layer's measured sensitivity. Else they start from their specs' bits, and the penalty makes them small.
    config.allocate_widths = False
    # The fractions of the run between which the strengths grow from 0. A network that starts from random
    # weights should be on its way before it is made small.
    config.size_ramp = (0.0, 0.0)
    # Learned widths freeze once all targets hold, but not before this fraction of the run; at the last step
    # in any case.
    config.freeze_widths_after = 0.5
    config.accumulator_strength = 1e-3  # Of A2Q's penalty on norms that the accumulator does not allow.
    # Oscillating weights: strength * squared distance of all weights from their grids is added to the loss;
    # it grows from 0 by a cosine. 0 is off.
    config.oscillation_damping = 0.0
    # Weights of at most four bits freeze that change back and forth more often than these frequencies, over
    # the last hundred steps or so, at the first and at the last step; (0.1, 0.01), say. (0.0, 0.0) is off. Of
    # learned widths once these are frozen.
    config.oscillation_freezing = (0.0, 0.0)

    # The run.
    config.seed = 0
    config.num_devices = 0  # 0: all; on a CPU as many cores as divide the batch.
    config.steps_per_dispatch = 0  # 0: 50; 1 on a CPU, and of streamed images.
    config.eval_batch_size = 1000  # Of all devices together.
    config.log_every_steps = 50
    config.eval_every_epochs = 1.0  # On the validation split; there is no such evaluation without one.
    config.checkpoint_every_steps = 500
    config.keep_checkpoints = 2  # Latest ones; the best by validation is kept besides.
    return config.lock()
