# An encoder of one's own from speech without labels, iteration by iteration, and what its layers tell of emotion:
# `snakemake pretrain` and `snakemake probes`, with presets/pretrain.yaml. Not part of an experiment.
PRETRAINING = "pretraining/iteration{iteration}"
CODEBOOK = "fold{fold}/seed{seed}/layer{layer}/{size}"


rule speech:
    output:
        audio=directory("<results>/speech/audio"),
        utterances="<results>/speech/utterances.parquet",
        excluded="<results>/speech/excluded.parquet",
        provenance="<logs>/pretraining/speech.json",
    log:
        "<logs>/pretraining/speech.log",
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    params:
        manifest=str(CONFIG.pretraining.speech),
        speeds=CONFIG.pretraining.speeds,
        code=code_hash("speech"),
    shell:
        "python -m gmp_atl speech --manifest {params.manifest:q} --speeds {params.speeds} --threads {threads}"
        " --audio-root {output.audio} --utterances {output.utterances} --excluded {output.excluded}"
        " --provenance {output.provenance} 2> {log}"


rule mfcc:
    input:
        utterances=rules.speech.output.utterances,
        audio=rules.speech.output.audio,
    output:
        features=temp("<results>/pretraining/mfcc.parquet"),
        provenance="<logs>/pretraining/mfcc.json",
    log:
        "<logs>/pretraining/mfcc.log",
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    params:
        code=code_hash("mfcc"),
    shell:
        "python -m gmp_atl mfcc --threads {threads} --utterances {input.utterances} --audio-root {input.audio}"
        " --output {output.features} --provenance {output.provenance} 2> {log}"


# The stages of the experiment, on speech of which nothing is held out.
use rule local_features as speech_local_features with:
    input:
        utterances=rules.speech.output.utterances,
        encoder=encoder_before,
    output:
        features=temp(f"<results>/{PRETRAINING}/local_features.parquet"),
        provenance=f"<logs>/{PRETRAINING}/local_features.json",
    log:
        f"<logs>/{PRETRAINING}/local_features.log",
    benchmark:
        f"<benchmarks>/{PRETRAINING}/local_features.tsv"
    params:
        config=settings("local_features"),
        audio_root=rules.speech.output.audio,
        encoder=subpath(input.encoder, parent=True),
        code=code_hash("local_features"),


use rule layer_features as speech_layer_features with:
    input:
        utterances=rules.speech.output.utterances,
        features=rules.speech_local_features.output.features,
        encoder=encoder_before,
    output:
        layers=[temp(f"<results>/{PRETRAINING}/layer_features/fold{{fold}}/{{layer}}.parquet")],
        provenance=f"<logs>/{PRETRAINING}/layer_features/fold{{fold}}/{{layer}}.json",
    log:
        f"<logs>/{PRETRAINING}/layer_features/fold{{fold}}/{{layer}}.log",
    benchmark:
        f"<benchmarks>/{PRETRAINING}/layer_features/fold{{fold}}/{{layer}}.tsv"
    params:
        config=settings("layer_features"),
        encoder=subpath(input.encoder, parent=True),
        layers="{layer}",
        code=code_hash("layer_features"),


use rule clustering as speech_clustering with:
    input:
        utterances=rules.speech.output.utterances,
        features=clustered_speech,
    output:
        centroids=f"<results>/{PRETRAINING}/clustering/{CODEBOOK}.safetensors",
        labels=f"<results>/{PRETRAINING}/clustering/{CODEBOOK}.parquet",
        provenance=f"<logs>/{PRETRAINING}/clustering/{CODEBOOK}.json",
    log:
        f"<logs>/{PRETRAINING}/clustering/{CODEBOOK}.log",
    benchmark:
        f"<benchmarks>/{PRETRAINING}/clustering/{CODEBOOK}.tsv"


rule pretraining:
    input:
        utterances=rules.speech.output.utterances,
        audio=rules.speech.output.audio,
        previous=encoder_before,
        labels=codebooks_of_iteration,
    output:
        expand(f"<results>/{PRETRAINING}/encoders/{{updates}}/config.json", updates=UPDATES, allow_missing=True),
        expand(
            f"<results>/{PRETRAINING}/encoders/{{updates}}/model.safetensors", updates=UPDATES[:-1], allow_missing=True
        ),
        last=f"<results>/{PRETRAINING}/encoders/last/model.safetensors",
        history=f"<results>/{PRETRAINING}/history.parquet",
        provenance=f"<logs>/{PRETRAINING}/pretraining.json",
    log:
        f"<logs>/{PRETRAINING}/pretraining.log",
    benchmark:
        f"<benchmarks>/{PRETRAINING}/pretraining.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=16_000,
        runtime=720,
    params:
        config=settings_of_iteration,
        seed=CONFIG.seeds[0],
        previous=lambda _, input: f"--previous {Path(input.previous).parent}" if input.previous else "",
        folder=subpath(output.history, parent=True),
        code=code_hash("pretraining"),
    shell:
        "python -m gmp_atl pretraining --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --seed {params.seed} --utterances {input.utterances} --audio-root {input.audio} {params.previous}"
        " --pseudo-labels {input.labels} --output {params.folder}/encoders --history {output.history}"
        " --checkpoint {params.folder}/checkpoint.safetensors --provenance {output.provenance} 2> {log}"


use rule local_features as probe_local_features with:
    input:
        utterances=rules.corpus.output.utterances,
        encoder=f"<results>/{PRETRAINING}/encoders/{{updates}}/model.safetensors",
    output:
        features=temp(f"<results>/{PRETRAINING}/probes/{{updates}}/local_features.parquet"),
        provenance=f"<logs>/{PRETRAINING}/probes/{{updates}}/local_features.json",
    log:
        f"<logs>/{PRETRAINING}/probes/{{updates}}/local_features.log",
    benchmark:
        f"<benchmarks>/{PRETRAINING}/probes/{{updates}}/local_features.tsv"


rule probe:
    input:
        utterances=rules.corpus.output.utterances,
        features=rules.probe_local_features.output.features,
        encoder=rules.probe_local_features.input.encoder,
    output:
        probes=f"<results>/{PRETRAINING}/probes/{{updates}}/probes.parquet",
        provenance=f"<logs>/{PRETRAINING}/probes/{{updates}}/probe.json",
    log:
        f"<logs>/{PRETRAINING}/probes/{{updates}}/probe.log",
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=8_000,
        runtime=30,
    params:
        config=settings("probe"),
        encoder=subpath(input.encoder, parent=True),
        code=code_hash("probe"),
    shell:
        "python -m gmp_atl probe --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --utterances {input.utterances} --local-features {input.features} --encoder {params.encoder}"
        " --output {output.probes} --provenance {output.provenance} 2> {log}"


# The first iteration's encoder before its first update is the untrained one.
rule probes:
    input:
        untrained=expand(rules.probe.output.probes, iteration=1, updates=0),
        probes=expand(rules.probe.output.probes, iteration=ITERATIONS, updates=UPDATES[1:]),
        histories=expand(rules.pretraining.output.history, iteration=ITERATIONS),
        baseline=(expand(rules.baseline.output.predictions, fold=FOLDS) if CONFIG.tables.baseline == "egemaps" else []),
    output:
        expand("<results>/tables/probes.{suffix}", suffix=["csv", "md", "html"]),
        expand("<results>/figures/{figure}.svg", figure=["probes", "pretraining"]),
        provenance="<logs>/pretraining/probes.json",
    log:
        "<logs>/pretraining/probes.log",
    localrule: True
    conda:
        "../../envs/tables.yaml"
    params:
        folder=subpath(output[0], ancestor=2),
        baseline=lambda _, input: f"--baseline {' '.join(input.baseline)}" if input.baseline else "",
        names=["untrained", *expand("iteration {n}, update {updates}", n=ITERATIONS, updates=UPDATES[1:])],
        code=code_hash("probes"),
    shell:
        "python -m gmp_atl probes --names {params.names:q} --probes {input.untrained} {input.probes}"
        " --histories {input.histories} {params.baseline} --output {params.folder}"
        " --provenance {output.provenance} 2> {log}"


rule pretrain:
    input:
        utterances=rules.speech.output.utterances,
        encoder=expand(rules.pretraining.output.last, iteration=ITERATIONS[-1])[0],
        histories=expand(rules.pretraining.output.history, iteration=ITERATIONS),
    output:
        config="<results>/encoder/config.json",
        encoder="<results>/encoder/model.safetensors",
        card="<results>/encoder/README.md",
        provenance="<logs>/pretraining/pretrain.json",
    log:
        "<logs>/pretraining/pretrain.log",
    localrule: True
    conda:
        "../../envs/torch.yaml"
    params:
        config=settings("pretraining"),
        encoder=subpath(input.encoder, parent=True),
        folder=subpath(output.encoder, parent=True),
        code=code_hash("pretrain"),
    shell:
        "python -m gmp_atl pretrain --config {params.config:q} --utterances {input.utterances}"
        " --encoder {params.encoder} --histories {input.histories} --output {params.folder}"
        " --provenance {output.provenance} 2> {log}"
