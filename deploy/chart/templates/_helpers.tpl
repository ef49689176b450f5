{{/* The name of everything. KubeRay adds to it, and allows a RayService 47 characters. */}}
{{- define "diptych.name" -}}
{{- $name := default .Release.Name .Values.nameOverride -}}
{{- if gt (len $name) 40 -}}
{{- fail (printf "the name %s has %d characters; at most 40 leave room for what is added to it: set nameOverride" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the name %s must begin with a letter and have only small letters, digits and dashes: set nameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "diptych.labels" -}}
app.kubernetes.io/name: diptych
app.kubernetes.io/instance: {{ include "diptych.name" . }}
{{- end -}}

{{- define "diptych.metaLabels" -}}
{{ include "diptych.labels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "diptych.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "diptych.serviceAccount" -}}
{{ default (include "diptych.name" .) .Values.serviceAccount.name }}
{{- end -}}

{{/*
What the workers in a group's pods are, as JSON: its pool's settings in `cluster`, and over them those of the pool's group of
this name, if the pool has groups (deploy/pools.py).
  pool, name: of the group
*/}}
{{- define "diptych.workers" -}}
{{- $pool := index .root.Values.cluster .pool | default dict -}}
{{- $groups := $pool.groups | default dict -}}
{{- $settings := omit $pool "groups" -}}
{{- if $groups -}}
{{- $own := index $groups .name | default dict -}}
{{- $settings = merge (dict "replicas" ($own.replicas | default 1)) (omit $own "replicas") $settings -}}
{{- if hasKey $own "replicas" -}}{{- $_ := set $settings "replicas" $own.replicas -}}{{- end -}}
{{- range $key := list "surge" "num_gpus" "num_cpus" -}}{{/* to `merge`, nothing and 0 are the same */}}
{{- if hasKey $own $key -}}{{- $_ := set $settings $key (index $own $key) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $settings -}}
{{- end -}}

{{/* What a group's pods offer and its workers need: a custom resource of Ray. */}}
{{- define "diptych.resource" -}}
{{- $pool := index .root.Values.cluster .pool | default dict -}}
{{- if $pool.groups }}{{ .pool }}-{{ .name }}{{ else }}{{ .pool }}{{ end -}}
{{- end -}}

{{/* Seconds that a process may take to drain: role "router" or a pool, name of the group. Defaults are those of the settings classes. */}}
{{- define "diptych.drainSeconds" -}}
{{- $cluster := .root.Values.cluster -}}
{{- if eq .role "router" -}}
{{- $router := $cluster.router | default dict -}}
{{- ceil ($router.drain_s | default 30) -}}
{{- else -}}
{{- $worker := $cluster.worker | default dict -}}
{{- $own := (include "diptych.workers" (dict "root" .root "pool" .role "name" .name) | fromJson).worker | default dict -}}
{{- ceil ($own.drain_s | default ($worker.drain_s | default 30)) -}}
{{- end -}}
{{- end -}}

{{/* Routers are held back at first; workers are not. */}}
{{- define "diptych.holdSeconds" -}}
{{- if eq .role "router" }}{{ int .root.Values.drain.holdSeconds }}{{ else }}0{{ end -}}
{{- end -}}

{{- define "diptych.graceSeconds" -}}
{{- add (include "diptych.drainSeconds" . | int) (include "diptych.holdSeconds" . | int) (int .root.Values.drain.slackSeconds) -}}
{{- end -}}

{{/* Pods of a group at first: as many as workers, where it is known which are its own. */}}
{{- define "diptych.groupReplicas" -}}
{{- $group := index .root.Values.groups .name -}}
{{- $workers := include "diptych.workers" (dict "root" .root "pool" $group.pool "name" .name) | fromJson -}}
{{- $alone := true -}}
{{- if not (index .root.Values.cluster $group.pool | default dict).groups -}}
{{- range $other, $its := .root.Values.groups -}}
{{- if and (ne $other $.name) (eq $its.pool $group.pool) -}}{{- $alone = false -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if hasKey $group "replicas" -}}
{{- int $group.replicas -}}
{{- else if $alone -}}
{{- max (int $group.minReplicas) (min (int ($workers.replicas | default 0)) (int $group.maxReplicas)) -}}
{{- else -}}
{{- int $group.minReplicas -}}
{{- end -}}
{{- end -}}

{{/* What the values must agree on, beside their types. */}}
{{- define "diptych.check" -}}
{{- $v := .Values -}}
{{- range $name, $group := $v.groups -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "groups.%s: a group's name is part of names of objects: small letters, digits and dashes" $name) -}}
{{- end -}}
{{- if or (eq $name "router") (eq $name "head") -}}
{{- fail (printf "groups.%s: that name is taken by the chart; call the group something else" $name) -}}
{{- end -}}
{{- if gt (add (len (include "diptych.name" $)) (len $name)) 46 -}}
{{- fail (printf "groups.%s: with %s before it the name has more than 47 characters; shorten one of them" $name (include "diptych.name" $)) -}}
{{- end -}}
{{- if gt (int $group.minReplicas) (int $group.maxReplicas) -}}
{{- fail (printf "groups.%s: minReplicas is %d and maxReplicas %d; raise maxReplicas" $name (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- $grows := and (eq $v.mode "ray") $v.ray.autoscaler.enabled -}}
{{- range $pool := list "prefill" "decode" "standby" -}}
{{- $settings := index $v.cluster $pool | default dict -}}
{{- $own := $settings.groups | default dict -}}
{{- if $own -}}
{{- range $name, $group := $v.groups -}}
{{- if and (eq $group.pool $pool) (not (hasKey $own $name)) -}}
{{- fail (printf "groups.%s has pods for %s, and cluster.%s.groups does not say what its workers are; add it there, or set groups.%s to null" $name $pool $pool $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $part := ternary (keys $own | sortAlpha) (list "") (gt (len $own) 0) -}}
{{- $path := printf "cluster.%s" $pool -}}
{{- if $part -}}
{{- $path = printf "cluster.%s.groups.%s" $pool $part -}}
{{- if ne ((index $v.groups $part | default dict).pool | default "") $pool -}}
{{- fail (printf "%s has no pods; add groups.%s with pool: %s" $path $part $pool) -}}
{{- end -}}
{{- end -}}
{{- $workers := include "diptych.workers" (dict "root" $ "pool" $pool "name" $part) | fromJson -}}
{{- $wanted := $workers.replicas | default 0 | int -}}
{{- $surge := ternary 1 0 (and (eq $v.mode "ray") (gt $wanted 0) (ne (toString $workers.surge) "0")) -}}
{{- $room := 0 -}}
{{- range $name, $group := $v.groups -}}
{{- if and (eq $group.pool $pool) (or (not $part) (eq $name $part)) -}}
{{- $room = add $room (ternary (int $group.maxReplicas) (include "diptych.groupReplicas" (dict "root" $ "name" $name) | int) $grows) -}}
{{- end -}}
{{- end -}}
{{- if gt $wanted (int $room) -}}
{{- fail (printf "%s.replicas is %d, and its groups have room for %d pods; raise maxReplicas, or add a group with pool: %s" $path $wanted (int $room) $pool) -}}
{{- end -}}
{{- if gt (add $wanted $surge) (int $room) -}}
{{- fail (printf "%s has room for %d pods, as many as workers, and an upgrade starts one more before one leaves; make room (maxReplicas, ray.autoscaler), or set %s.surge: 0" $path (int $room) $path) -}}
{{- end -}}
{{- $engine := merge (dict) ($workers.engine | default dict) ($v.cluster.engine | default dict) -}}
{{- $ranks := $engine.tensor_parallel | default 1 | int -}}
{{- $gpus := $workers.num_gpus | default 0 | int -}}
{{- $onGpus := or (gt $gpus 0) (eq ($engine.device | default "auto") "cuda") -}}
{{- if and (gt $ranks 1) (ne ($engine.device | default "auto") "cpu") $onGpus (gt $ranks $gpus) -}}
{{- fail (printf "%s.num_gpus is %d and its engine.tensor_parallel is %d: each rank needs a GPU of its own; set num_gpus to %d, or lower tensor_parallel" $path $gpus $ranks $ranks) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $scaling := $v.cluster.scaling | default dict -}}
{{- $byOthers := or $v.autoscaling.hpa $v.autoscaling.keda -}}
{{- if and $byOthers $scaling.budget_gpus -}}
{{- fail "cluster.scaling.budget_gpus and autoscaling.hpa or keda are both set, and two actuators would undo each other's work; drop one" -}}
{{- end -}}
{{- if and $byOthers (eq $v.mode "ray") -}}
{{- fail "autoscaling.hpa and keda need mode: deployments, since a RayService cannot be scaled from outside; or use cluster.scaling" -}}
{{- end -}}
{{- range $name, $_ := $v.autoscaling.hpa -}}
{{- if hasKey $v.autoscaling.keda $name -}}
{{- fail (printf "autoscaling.hpa.%s and autoscaling.keda.%s are both set; drop one" $name $name) -}}
{{- end -}}
{{- end -}}
{{- range $name, $_ := merge (dict) $v.autoscaling.hpa $v.autoscaling.keda -}}
{{- if not (or (eq $name "router") (hasKey $v.groups $name)) -}}
{{- fail (printf "autoscaling of %s: there is no such group; name router or one of groups" $name) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.mode "deployments") $scaling.budget_gpus (not $scaling.dry_run) -}}
{{- fail "cluster.scaling resizes pools through Ray Serve: set mode: ray, or scaling.dry_run: true" -}}
{{- end -}}
{{- if and (eq $v.ray.gcs.faultTolerance "redis") (not $v.ray.gcs.redisAddress) -}}
{{- fail "ray.gcs.faultTolerance is redis; set ray.gcs.redisAddress" -}}
{{- end -}}
{{- if and (not $v.security.insecureOk) (not $v.security.secrets.apiKeys) (not $v.security.clientCertificates) -}}
{{- fail "security.secrets.apiKeys is empty and clientCertificates false: everybody could use the routers; set one of them" -}}
{{- end -}}
{{- if and $v.gateway.enabled (not $v.gateway.parentRefs) -}}
{{- fail "gateway.enabled needs gateway.parentRefs, the Gateway that the routes belong to: [{name: my-gateway}]" -}}
{{- end -}}
{{- if and $v.gateway.inferencePool.enabled (not $v.gateway.inferencePool.picker) -}}
{{- fail "gateway.inferencePool needs its picker: the Service of the endpoint picker" -}}
{{- end -}}
{{- end -}}

{{- define "diptych.security" -}}
{{- $s := .Values.security -}}
{{- $at := "/etc/diptych/security" -}}
{{- $section := dict -}}
{{- if $s.limits -}}{{- $_ := set $section "limits" $s.limits -}}{{- end -}}
{{- if $s.insecureOk -}}
{{- $_ := set $section "insecure_ok" true -}}
{{- else -}}
{{- $public := dict "certificate" (printf "%s/public.crt" $at) "key" (printf "%s/public.key" $at) -}}
{{- if $s.clientCertificates -}}{{- $_ := set $public "client_ca" (printf "%s/public-ca.crt" $at) -}}{{- end -}}
{{- $_ := set $section "public_tls" $public -}}
{{- $_ := set $section "internal_tls" (dict
  "ca" (printf "%s/internal-ca.crt" $at)
  "router" (dict "certificate" (printf "%s/router.crt" $at) "key" (printf "%s/router.key" $at))
  "worker" (dict "certificate" (printf "%s/worker.crt" $at) "key" (printf "%s/worker.key" $at))) -}}
{{- $_ := set $section "cluster_secret" (printf "%s/cluster.secret" $at) -}}
{{- if $s.secrets.apiKeys -}}{{- $_ := set $section "api_keys" (printf "%s/keys.yaml" $at) -}}{{- end -}}
{{- end -}}
{{- toYaml (dict "security" $section) -}}
{{- end -}}

{{/* cluster.yaml: the values' section, and what Kubernetes decides. */}}
{{- define "diptych.cluster" -}}
{{- $v := .Values -}}
{{- $c := deepCopy $v.cluster -}}
{{- $_ := set $c "model" $v.model.path -}}
{{- $router := dict "host" "0.0.0.0" "internal_host" "0.0.0.0" "replicas" (int $v.router.replicas) "grpc_port" (int $v.ports.grpc) "http_port" (int $v.ports.http) "internal_port" (int $v.ports.registry) -}}
{{- $_ := set $c "router" (merge $router ($c.router | default dict)) -}}
{{- $_ := set $c "worker" (merge (dict "host" "0.0.0.0" "port" (int $v.ports.worker)) ($c.worker | default dict)) -}}
{{- $telemetry := merge (dict "metrics_host" "0.0.0.0" "metrics_port" (int $v.ports.metrics) "worker_metrics_port" (int $v.ports.workerMetrics)) ($c.telemetry | default dict) -}}
{{- if $v.monitoring.collector.enabled -}}
{{- $_ := set $telemetry "otlp_endpoint" (printf "http://%s-collector:4317" (include "diptych.name" .)) -}}
{{- end -}}
{{- $_ := set $c "telemetry" $telemetry -}}
{{- if $v.rdma.enabled -}}
{{- $transport := $c.transport | default dict -}}
{{- $_ := set $c "transport" (merge $transport (dict "ucx_net_devices" "rdma")) -}}
{{- end -}}
{{- $_ := set $c "security" (include "diptych.security" . | fromYaml).security -}}
{{- range $pool := list "prefill" "decode" "standby" -}}
{{- if (index $c $pool | default dict).groups -}}
{{- $_ := set $c $pool (omit (index $c $pool) "replicas") -}}{{/* which has a default here, and is that of the groups there */}}
{{- end -}}
{{- end -}}
{{- if eq $v.mode "ray" -}}
{{- range $pool := list "prefill" "decode" "standby" -}}
{{- $settings := index $c $pool | default dict -}}
{{- range $name, $own := $settings.groups -}}
{{- $needs := dict (include "diptych.resource" (dict "root" $ "pool" $pool "name" $name)) 1 -}}
{{- $_ := set $settings.groups $name (merge (dict "resources" $needs) ($own | default dict)) -}}
{{- end -}}
{{- $needs := ternary (dict) (dict "resources" (dict $pool 1)) (gt (len ($settings.groups | default dict)) 0) -}}
{{- $_ := set $c $pool (merge $needs $settings) -}}
{{- end -}}
{{- $_ := set $c "ray" (dict "router_resources" (dict "router" 1)) -}}
{{- end -}}
{{- toYaml $c -}}
{{- end -}}

{{- define "diptych.serveConfig" -}}
proxy_location: Disabled
applications:
  - name: diptych
    import_path: deploy.app:build
    route_prefix: null
    {{- $scaling := .Values.cluster.scaling | default dict }}
    external_scaler_enabled: {{ and (hasKey $scaling "budget_gpus") (not $scaling.dry_run) }}
    args:
{{ include "diptych.cluster" . | indent 6 }}
{{- end -}}
