# Stage 2: the frame-level GMPs, one codebook per layer and size, from the stage-1 HuBERT.
FEATURES = "<results>/layer_features/{{variant}}/fold{{fold}}/seed{{seed}}/{layer}.parquet"


rule layer_features:
    input:
        utterances=rules.corpus.output.utterances,
        features=rules.local_features.output.features,
        encoder=encoder_of_stage_1,
    output:
        layers=temp(expand(FEATURES, layer=GMPS)),
        provenance="<provenance>/layer_features/{variant}/fold{fold}/seed{seed}.json",
    log:
        "<logs>/layer_features/{variant}/fold{fold}/seed{seed}.log",
    benchmark:
        "<benchmarks>/layer_features/{variant}/fold{fold}/seed{seed}.tsv"
    wildcard_constraints:
        variant="main",
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=12_000,
        runtime=60,
    params:
        config=settings("layer_features"),
        encoder=subpath(input.encoder, parent=True),
        layers=lambda wildcards, output: [Path(path).stem for path in output.layers],
        code=code_hash("layer_features"),
    shell:
        "python -m gmp_atl layer_features --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --fold {wildcards.fold} --utterances {input.utterances} --local-features {input.features}"
        " --encoder {params.encoder} --layers {params.layers} --outputs {output.layers}"
        " --provenance {output.provenance} 2> {log}"


# Ablations are of one layer.
use rule layer_features as ablation_layer_features with:
    output:
        layers=temp(expand(FEATURES, layer=CONFIG.tables.layer)),
        provenance=rules.layer_features.output.provenance,
    wildcard_constraints:
        variant="(?!main/)[a-z0-9][a-z0-9_-]*",


rule clustering:
    input:
        utterances=rules.corpus.output.utterances,
        features="<results>/layer_features/{variant}/fold{fold}/seed{seed}/{layer}.parquet",
    output:
        centroids="<results>/clustering/{variant}/fold{fold}/seed{seed}/layer{layer}/{size}.safetensors",
        labels="<results>/clustering/{variant}/fold{fold}/seed{seed}/layer{layer}/{size}.parquet",
        provenance="<provenance>/clustering/{variant}/fold{fold}/seed{seed}/layer{layer}/{size}.json",
    log:
        "<logs>/clustering/{variant}/fold{fold}/seed{seed}/layer{layer}/{size}.log",
    benchmark:
        "<benchmarks>/clustering/{variant}/fold{fold}/seed{seed}/layer{layer}/{size}.tsv"
    conda:
        "../../envs/faiss.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=12_000,
        runtime=60,
    params:
        config=settings("clustering"),
        code=code_hash("clustering"),
    shell:
        "python -m gmp_atl clustering --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --fold {wildcards.fold} --seed {wildcards.seed} --layer {wildcards.layer} --size {wildcards.size}"
        " --utterances {input.utterances} --layer-features {input.features}"
        " --centroids {output.centroids} --pseudo-labels {output.labels}"
        " --provenance {output.provenance} 2> {log}"


rule cluster_statistics:
    input:
        utterances=rules.corpus.output.utterances,
        centroids=codebooks(rules.clustering.output.centroids, clustered_by),
        labels=codebooks(rules.clustering.output.labels, clustered_by),
    output:
        statistics="<results>/evaluations/clusters/{variant}/fold{fold}/seed{seed}/cluster_statistics.parquet",
        provenance="<provenance>/cluster_statistics/{variant}/fold{fold}/seed{seed}.json",
    log:
        "<logs>/cluster_statistics/{variant}/fold{fold}/seed{seed}.log",
    conda:
        "../../envs/faiss.yaml"
    params:
        config=settings("cluster_statistics"),
        code=code_hash("cluster_statistics"),
    shell:
        "python -m gmp_atl cluster_statistics --config {params.config:q} --variant {wildcards.variant}"
        " --fold {wildcards.fold} --seed {wildcards.seed} --utterances {input.utterances}"
        " --centroids {input.centroids} --pseudo-labels {input.labels} --output {output.statistics}"
        " --provenance {output.provenance} 2> {log}"
