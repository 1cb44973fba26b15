"""Every field of a config once, with what it means. The other files say what differs.

Sizes here are those of the flagship: CLIP ViT-L/14 and TinyLlama-1.1B.
"""

from ml_collections import ConfigDict


def get_config():
    """The defaults: image-text pairs (stage 1) on one device."""
    config = ConfigDict()

    config.seed = 0  # of the initial parameters and of the data's order and augmentation
    config.steps = 10_000  # optimizer steps
    config.batch_size = 256  # images a step, over all devices and hosts
    # Parts of a batch that are worked through one after the other, for less memory: the gradient is
    # that of the whole batch, all negatives included, for a forward pass of the embeddings more
    # (and with packed rows, of the captions too).
    config.accumulation_steps = 1
    config.init_from = ""  # folder of tools/import_hf.py, or of a run; "": random parameters
    config.average_decay = 0.0  # moving average of the parameters, which evaluation uses; 0: none
    # Sizes of the mesh; -1: the rest of the devices. `slice` and `data` copy the parameters, `fsdp`
    # splits them and the batch, `tensor` splits heads and mlp. slice: over TPU slices.
    config.mesh = ConfigDict(dict(slice=1, data=-1, fsdp=1, tensor=1))
    config.compile_cache = ".jax_cache"  # folder of compiled programs, kept between runs; "": none
    config.compiled_step = ""  # file of tools/preflight.py --save, instead of compiling the step
    config.tpu_options = ConfigDict()  # the compiler's, by name, for the train step on TPUs

    config.model = ConfigDict()
    config.model.joint_dim = 768  # E: size of the embeddings
    config.model.embedding_grid = 1  # g_e: cells a side that make an embedding; 1: the mean
    config.model.generation_grid = 8  # g_g: visual tokens a side
    config.model.temperature = 0.07  # initial; learned, its inverse clamped at 100
    config.model.image_mean = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    config.model.image_std = (0.26862954, 0.26130258, 0.27577711)

    config.model.vision = ConfigDict()
    config.model.vision.image_size = 224  # pixels a side
    config.model.vision.patch_size = 14
    config.model.vision.width = 1024
    config.model.vision.depth = 24
    config.model.vision.heads = 16
    config.model.vision.mlp = 4096
    config.model.vision.activation = "quick_gelu"  # or gelu
    config.model.vision.norm_epsilon = 1e-5
    # plain; or rows: on TPUs in one kernel, a whole row at a time, of some hundred cells or tokens
    config.model.vision.attention = "plain"
    config.model.vision.dtype = "bfloat16"  # of the computation; parameters are fp32
    # What the backward pass computes again, from most memory to least: none; dots: all but products
    # with parameters; attention: norms and activations (and with plain and splash the inside of
    # attention); outputs: queries, keys and values too; projections: those not, but attention (with
    # splash all but its inside is kept); full: a whole layer.
    config.model.vision.remat = "full"
    config.model.vision.unroll = 1  # layers laid out in one turn of the scan; depth: no loop

    config.model.decoder = ConfigDict()
    config.model.decoder.vocab_size = 0  # 0: the tokenizer's, padded to a multiple of 128
    config.model.decoder.width = 2048
    config.model.decoder.depth = 22
    config.model.decoder.heads = 32
    config.model.decoder.kv_heads = 4
    config.model.decoder.head_dim = 64
    config.model.decoder.mlp = 5632
    config.model.decoder.rope_theta = 10_000.0
    # Rotary positions of a decoder that was stretched to longer rows: none; linear (all slowed by
    # the factor); llama3 (only what turns seldom over the original length). The factors low and
    # high are numbers of such turns.
    config.model.decoder.rope_scaling = ConfigDict()
    config.model.decoder.rope_scaling.type = "none"
    config.model.decoder.rope_scaling.factor = 1.0
    config.model.decoder.rope_scaling.low_freq_factor = 1.0
    config.model.decoder.rope_scaling.high_freq_factor = 4.0
    config.model.decoder.rope_scaling.original_length = 8192  # tokens
    config.model.decoder.norm_epsilon = 1e-5
    config.model.decoder.tie_embeddings = False
    # plain; rows, as above; or splash: on TPUs, for rows of any length, by blocks of the logits
    config.model.decoder.attention = "plain"
    config.model.decoder.dtype = "bfloat16"
    config.model.decoder.remat = "full"
    config.model.decoder.unroll = 1

    config.loss = ConfigDict()
    config.loss.embedding_weight = 1.0  # of L_Emb; 0: not computed
    config.loss.generation_weight = 1.0  # of L_Gen; 0: not computed
    config.loss.mask_duplicates = True  # pairs with the same caption are not negatives
    # Regions of one image whose intersection over union is above this are not negatives; 1: all are
    config.loss.mask_overlap = 0.5

    config.optimizer = ConfigDict()
    config.optimizer.warmup_steps = 500
    config.optimizer.final_share = 0.0  # of the learning rate, at the last step of the cosine
    config.optimizer.clip_norm = 1.0  # of the global gradient; 0: no clipping
    config.optimizer.adam_b1 = 0.9
    config.optimizer.adam_b2 = 0.98
    config.optimizer.adam_epsilon = 1e-8
    config.optimizer.muon_beta = 0.95
    # Every parameter belongs to exactly one group, the one whose pattern matches its path.
    # algorithm: adamw, muon (matrices only) or frozen. weight_decay: of matrices only.
    config.optimizer.groups = ConfigDict()
    config.optimizer.groups.vision = group("vision/.*", "adamw", 1e-5, 0.05)
    config.optimizer.groups.decoder = group("decoder/.*", "adamw", 2e-5, 0.05)
    config.optimizer.groups.joint = group(".*_projection/.*|logit_scale", "adamw", 1e-3, 0.05)

    config.data = ConfigDict()
    config.data.name = ""  # a TFDS data set, such as emoji/things
    config.data.dir = "data"  # where TFDS data sets are
    config.data.split = "train"  # in TFDS's notation; train+validation is both
    # Files to train on instead of `name`: patterns, with * and {00000..00999}, here or remote
    # (gs://...), of WebDataset's .tar, of .jsonl with image paths or of .array_record. `name` is
    # then only evaluated on.
    config.data.files = ()
    # Tar files are shuffled by shard, and so many examples of the shards in a row among themselves;
    # all else is shuffled as a whole.
    config.data.window = 16_384
    config.data.index_dir = ".data_index"  # folder of what is found where in tar files
    # Broken examples are replaced by others and counted; a larger share of 10,000 ends the run.
    config.data.max_broken_share = 0.05
    config.data.max_pixels = 100_000_000  # of an image; above it counts as broken
    config.data.max_aspect = 50.0  # of the long side to the short one; above it counts as broken
    config.data.max_bytes = 100_000_000  # of an image's file, or a sample of a tar; above: broken
    config.data.tokenizer = ""  # folder or hub name; "": `tokenizer` in the data set's folder
    config.data.image_field = "image"
    # One text for L_Emb is drawn for each image by these weights. {field} is a text of the
    # record, or a few of its texts, shuffled, where the field is a list; of a list {field|one} is
    # one at random, {field|first} and {field|longest} what they say. {a.b} is field b of a.
    config.data.text_templates = ("{caption}",)
    config.data.text_weights = (1.0,)
    config.data.caption_template = "{caption}"  # the text for L_Gen
    # Regions (stage 2): a field that is a list of bbox and text; "": images alone. Such an image is
    # resized to the square as a whole, not cropped.
    config.data.regions_field = ""
    config.data.whole_image = True  # whether an image with regions also comes with the texts above
    config.data.max_regions = 16  # of an image in a batch; of more, so many are drawn, and counted
    config.data.min_visible = 0.5  # share of a box that the augmented view must show
    # Other sources by name, each of them `config.data` with other values for some of its fields.
    # A batch is of one source, drawn by its weight; empty: `config.data` itself is the only one.
    config.data.mixture = ConfigDict()
    config.data.weight = 1.0  # of a source of the mixture
    config.data.text_length = 77  # tokens with <s> and [EMB]
    config.data.caption_length = 77  # tokens with <s> and </s>
    # Packed rows: the texts of a group of images share rows, instead of a row of the longest's
    # length for each. Groups are what is split over devices; a worker makes whole ones.
    config.data.packing = ConfigDict()
    config.data.packing.images = 0  # of a group, for all sources of a mixture; 0: padded rows
    config.data.packing.rows = 0  # of a group
    config.data.packing.row_length = 0  # tokens, with the visual tokens of the captions
    config.data.packing.targets = 0  # caption tokens of a group at most
    # The first so many rows of a group hold texts alone and the others captions alone, and the
    # decoder runs twice; 0: both kinds in all rows, and one pass.
    config.data.packing.text_rows = 0
    config.data.packing.waiting = 8  # images at hand, of which the next is chosen that fits best
    config.data.workers = 8  # processes that read, decode and tokenise; 0: the main process
    # Threads of a worker that read and decode at once: above 0 where files are remote, whose
    # answers take long to come.
    config.data.read_threads = 0
    config.data.prefetch = 2  # batches each worker has ready; with packed rows all of them together
    config.data.ahead = 1  # batches that are made and sent to the devices while earlier steps run

    # Augmentation of training images; all off is the evaluation's resize of the short side and
    # centre crop, pixel for pixel.
    config.data.augment = ConfigDict()
    # Random resized crop: its smallest share of the area, and its most extreme aspect ratio, either
    # way. Below 1 it takes the place of scale, shift, stretch and rotation, which must be off.
    config.data.augment.min_area = 1.0
    config.data.augment.max_ratio = 4 / 3
    config.data.augment.flip = 0.0  # how often left and right are exchanged
    config.data.augment.draft = False  # decode large JPEGs at part of their size: not exact
    config.data.augment.min_scale = 1.0  # smallest size of the crop, as a share of the image
    config.data.augment.max_scale = 1.0  # above 1, the image is set in a margin
    config.data.augment.shift = 0.0  # of the crop's centre, as a share of the image
    config.data.augment.stretch = 0.0  # of the aspect ratio: 0.1 is 0.9 to 1.1
    config.data.augment.rotate = 0.0  # degrees, either way
    config.data.augment.colour = 0.0  # of brightness, contrast and saturation, as a share
    config.data.augment.background = 0.0  # how often a transparent background is a random colour

    config.eval = ConfigDict()
    config.eval.every = 1_000  # steps; the end is always evaluated
    config.eval.splits = ()  # splits evaluated during training
    config.eval.final_splits = ()  # splits evaluated at the end, into results.json
    config.eval.sample_split = ""  # the final split that samples.png shows
    config.eval.batch_size = 256
    config.eval.caption_field = "caption"  # the text to retrieve and to generate
    config.eval.class_field = ""  # the zero-shot classes' names; "": no classification
    config.eval.pixel_floor = False  # also score the nearest training image by pixels: small data
    config.eval.samples = 24  # drawings in samples.png

    config.log = ConfigDict()
    config.log.every = 50  # steps between lines of metrics
    config.log.profile_from = 1  # first step of a trace by jax.profiler, in WORKDIR/profile
    config.log.profile_steps = 0  # steps of it; 0: no trace
    config.log.peak_flops = 0.0  # of a device, a second, for perf/mfu; 0: a TPU's own, else no mfu
    config.log.conflict_every = 0  # steps between probes of the objectives' gradients; 0: never
    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1_000  # steps; the end is always saved
    config.checkpoint.keep = 3  # the newest ones; 0: all
    config.checkpoint.keep_every = 0  # and those whose step is a multiple of it; 0: no others
    # And those with the best values of a metric of evaluation, such as
    # eval/validation/retrieval/image_to_text_r1, of steps that are evaluated and saved; "-" before
    # it: the lowest.
    config.checkpoint.best = ""
    config.checkpoint.keep_best = 1

    # An update whose loss or gradient is not finite is skipped, and counted.
    config.faults = ConfigDict()
    config.faults.stop_after = 10  # skipped updates in a row that end the run
    # Also skipped: a loss this many standard deviations above its moving mean; 0: none is.
    config.faults.spike = 0.0
    config.faults.window = 100  # steps of that mean, of each source, which first have to be taken
    return config.lock()  # a field that is not here is a mistake


def group(pattern, algorithm, learning_rate, weight_decay):
    """One group of parameters of the optimizer."""
    return ConfigDict(
        dict(
            pattern=pattern,
            algorithm=algorithm,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        )
    )
