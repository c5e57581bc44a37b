# For the report alone: of the first fold and seed, a map of the held-out utterances, and one of each class in detail.
rule examples:
    input:
        utterances=rules.corpus.output.utterances,
        features=rules.local_features.output.features,
        pretrained=rules.pretrained.output.encoder,
        multitask=first(rules.multitask.output.encoder),
        centroids=expand(rules.clustering.output.centroids, size=SIZES, **FIRST),
        model=first(rules.finetuning.output.encoder),
        predictions=first(rules.evaluation.output.predictions),
    output:
        embeddings="<results>/evaluations/examples/embeddings.parquet",
        examples="<results>/evaluations/examples/examples.parquet",
        provenance="<provenance>/examples.json",
    log:
        "<logs>/examples.log",
    benchmark:
        "<benchmarks>/examples.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=8_000,
        runtime=30,
    params:
        config=settings("examples"),
        audio_root=lambda _: AUDIO_ROOT,
        first=FIRST,
        fit_on=CONFIG.clustering.fit_on,
        pretrained=subpath(input.pretrained, parent=True),
        multitask=subpath(input.multitask, parent=True),
        model=subpath(input.model, parent=True),
        code=code_hash("examples"),
    shell:
        "python -m gmp_atl examples --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --fold {params.first[fold]} --seed {params.first[seed]} --utterances {input.utterances}"
        " --audio-root {params.audio_root:q} --local-features {input.features} --pretrained {params.pretrained}"
        " --multitask {params.multitask} --centroids {input.centroids} --model {params.model}"
        " --predictions {input.predictions} --fit-on {params.fit_on}"
        " --embeddings {output.embeddings} --output {output.examples} --provenance {output.provenance} 2> {log}"
