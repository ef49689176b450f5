{{/*
One pod template, for a router or a worker, under Ray or as a Deployment.
  root: the chart's scope    role: router, or the pool of the group    name: router, or the group's name    pod: its own settings
*/}}
{{- define "diptych.podTemplate" -}}
{{- $v := .root.Values -}}
{{- $router := eq .role "router" -}}
{{- $base := $v.pod -}}
{{- if $router -}}{{- $base = omit $v.pod "resources" -}}{{- end -}}
{{- $pod := mergeOverwrite (deepCopy $base) (deepCopy (.pod | default dict)) -}}
{{- $pool := dict -}}
{{- if not $router -}}{{- $pool = include "diptych.workers" (dict "root" .root "pool" .role "name" .name) | fromJson -}}{{- end -}}
{{- $rdma := and $v.rdma.enabled (not $router) -}}
metadata:
  labels:
    {{- include "diptych.labels" .root | nindent 4 }}
    diptych.dev/role: {{ .role }}
    diptych.dev/group: {{ .name }}
    {{- with $pod.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    diptych.dev/pod-settings: {{ include "diptych.security" .root | sha256sum | trunc 16 | quote }}
    {{- with $pod.annotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  serviceAccountName: {{ include "diptych.serviceAccount" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "diptych.graceSeconds" . }}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets: {{ toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- $context := dict "runAsNonRoot" true "runAsUser" 1000 "runAsGroup" 1000 "fsGroup" 1000 "fsGroupChangePolicy" "OnRootMismatch" "seccompProfile" (dict "type" "RuntimeDefault") }}
    {{- toYaml (mergeOverwrite $context ($pod.securityContext | default dict)) | nindent 4 }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" "schedulerName" "hostNetwork" "dnsPolicy" }}
  {{- with index $pod $key }}
  {{ $key }}: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  topologySpreadConstraints:
    {{- if $pod.topologySpreadConstraints }}
    {{- toYaml $pod.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "diptych.labels" .root | nindent 10 }}
          diptych.dev/group: {{ .name }}
    {{- end }}
  {{- with $pod.initContainers }}
  initContainers: {{ toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-worker" "diptych" (eq $v.mode "ray") }}
      image: {{ include "diptych.image" .root | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      {{- if eq $v.mode "deployments" }}
      command: [diptych, run, {{ .role }}, --config, /etc/diptych/cluster/cluster.yaml]
      args:
        - --advertise-host=$(POD_IP)
        {{- if not $router }}
        - --routers={{ include "diptych.name" .root }}-routers:{{ $v.ports.registry }}
        {{- if (index $v.cluster .role | default dict).groups }}
        - --group={{ .name }}
        {{- end }}
        {{- end }}
      {{- end }}
      env:
        {{- include "diptych.environment" (dict "root" .root "pod" $pod) | nindent 8 }}
      ports:
        {{- if $router }}
        - {name: grpc, containerPort: {{ $v.ports.grpc }}}
        - {name: http, containerPort: {{ $v.ports.http }}}
        - {name: registry, containerPort: {{ $v.ports.registry }}}
        - {name: metrics, containerPort: {{ $v.ports.metrics }}}
        {{- else }}
        - {name: worker, containerPort: {{ $v.ports.worker }}}
        - {name: metrics, containerPort: {{ $v.ports.workerMetrics }}}
        {{- end }}
      {{- include "diptych.probes" . | nindent 6 }}
      terminationMessagePolicy: FallbackToLogsOnError
      lifecycle:
        preStop:
          exec:
            {{- if eq $v.mode "ray" }}
            command: [diptych, leave, --hold={{ include "diptych.holdSeconds" . }}, --timeout={{ add (include "diptych.drainSeconds" . | int) 10 }}]
            {{- else }}
            command: [sleep, {{ include "diptych.holdSeconds" . | quote }}]  # SIGTERM drains
            {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
          {{- if $rdma }}
          add: [IPC_LOCK]
          {{- end }}
      resources:
        {{- $resources := deepCopy ($pod.resources | default dict) }}
        {{- $limits := $resources.limits | default dict }}
        {{- $requests := $resources.requests | default dict }}
        {{- if $pool.num_gpus }}
        {{- $_ := set $limits $v.gpu.resource (ceil $pool.num_gpus | toString) }}
        {{- end }}
        {{- if $rdma }}
        {{- $_ := set $limits $v.rdma.resource ($v.rdma.count | toString) }}
        {{- with $v.rdma.hugepages }}
        {{- $_ := set $limits "hugepages-2Mi" . }}
        {{- $_ := set $requests "hugepages-2Mi" . }}
        {{- end }}
        {{- end }}
        {{- toYaml (dict "requests" $requests "limits" $limits) | nindent 8 }}
      volumeMounts:
        - {name: scratch, mountPath: /tmp}
        - {name: home, mountPath: /home/ray}
        - {name: pod, mountPath: /run/diptych}
        - {name: shared-memory, mountPath: /dev/shm}
        - {name: cache, mountPath: /var/cache/diptych}
        {{- if eq $v.mode "deployments" }}
        - {name: cluster, mountPath: /etc/diptych/cluster, readOnly: true}
        {{- end }}
        {{- if not $v.security.insecureOk }}
        - {name: security, mountPath: /etc/diptych/security, readOnly: true}
        {{- end }}
        {{- if $v.model.volume }}
        - {name: model, mountPath: {{ $v.model.mountPath }}, readOnly: true}
        {{- end }}
        {{- if and $rdma $v.rdma.hugepages }}
        - {name: hugepages, mountPath: /dev/hugepages}
        {{- end }}
        {{- with $pod.volumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
    {{- with $pod.extraContainers }}{{ toYaml . | nindent 4 }}{{ end }}
  volumes:
    - {name: scratch, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: pod, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
    - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ $v.sharedMemory }}}}
    - name: cache
      {{- toYaml $v.model.cache | nindent 6 }}
    {{- if eq $v.mode "deployments" }}
    - {name: cluster, configMap: {name: {{ include "diptych.name" .root }}-cluster}}
    {{- end }}
    {{- if not $v.security.insecureOk }}
    - name: security
      {{- include "diptych.securityVolume" . | nindent 6 }}
    {{- end }}
    {{- if $v.model.volume }}
    - name: model
      {{- toYaml $v.model.volume | nindent 6 }}
    {{- end }}
    {{- if and $rdma $v.rdma.hugepages }}
    - {name: hugepages, emptyDir: {medium: HugePages-2Mi}}
    {{- end }}
    {{- with $pod.volumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end -}}

{{- define "diptych.environment" -}}
{{- $v := .root.Values -}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: DIPTYCH_POD_DIR, value: /run/diptych}
- {name: DIPTYCH_HOME, value: /var/cache/diptych}
- {name: HF_HOME, value: /var/cache/diptych/hub}
- {name: TRITON_CACHE_DIR, value: /var/cache/diptych/triton}
{{- if $v.model.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- if $v.model.hubToken.secret }}
- {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: {{ $v.model.hubToken.secret }}, key: {{ $v.model.hubToken.key }}}}}
{{- end }}
{{- if eq $v.mode "ray" }}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_SERVE_LOG_TO_STDERR, value: "0"}
{{- else }}
- {name: DIPTYCH_LAST_WORDS, value: /dev/termination-log}  # `kubectl describe pod` shows why a process could not start
{{- end }}
{{- with (.pod | default dict).env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
Ready: a request would be answered. Kubernetes' own gRPC probe knows no TLS; `diptych health` does.
Alive, under Ray: the node, since Serve replaces a replica that is stuck; as a Deployment: the process, which ends itself when it is stuck.
*/}}
{{- define "diptych.probes" -}}
{{- $v := .root.Values -}}
{{- $router := eq .role "router" -}}
{{- $port := ternary $v.ports.grpc $v.ports.worker $router -}}
{{- $times := ternary $v.probes.router $v.probes.worker $router -}}
{{- $ready := dict "grpc" (dict "port" (int $port)) -}}
{{- if not $v.security.insecureOk -}}
{{- $target := printf "localhost:%d" (int $port) -}}
{{- if not $router -}}
{{- $ready = dict "exec" (dict "command" (list "diptych" "health" "--target" $target "--inside" "worker" "--config" "/etc/diptych/security/security.yaml" "--timeout" "5")) -}}
{{- else if $v.security.clientCertificates -}}
{{- $ready = dict "exec" (dict "command" (list "diptych" "health" "--target" (printf "localhost:%d" (int $v.ports.registry)) "--inside" "router" "--config" "/etc/diptych/security/security.yaml" "--timeout" "5")) -}}
{{- else -}}
{{- $ready = dict "httpGet" (dict "scheme" "HTTPS" "path" "/health" "port" "http") -}}
{{- end -}}
{{- if hasKey $ready "exec" -}}
{{- $times = merge (dict "periodSeconds" 10 "timeoutSeconds" 8) $times -}}
{{- end -}}
{{- end -}}
{{- $alive := dict "tcpSocket" (dict "port" (int (ternary $v.ports.grpc $v.ports.worker $router))) -}}
{{- if eq $v.mode "ray" -}}
{{- $alive = dict "httpGet" (dict "path" "/api/local_raylet_healthz" "port" 52365) -}}
{{- end -}}
readinessProbe:
  {{- toYaml (merge (deepCopy $ready) $times) | nindent 2 }}
startupProbe:
  {{- toYaml (merge (dict "periodSeconds" 5 "timeoutSeconds" 3 "failureThreshold" (div (add (int $v.probes.startSeconds) 4) 5)) $alive) | nindent 2 }}
livenessProbe:
  {{- toYaml (merge (dict "periodSeconds" 5 "timeoutSeconds" 3 "failureThreshold" 24) $alive) | nindent 2 }}
{{- end -}}

{{/* Certificates and secrets of one role, under the names that `security` has. Kubernetes replaces them in place, and Diptych follows. */}}
{{- define "diptych.securityVolume" -}}
{{- $v := .root.Values -}}
{{- $s := $v.security.secrets -}}
{{- $name := include "diptych.name" .root -}}
projected:
  defaultMode: 0440
  sources:
    {{- if not $v.security.certManager.enabled }}
    - secret: {name: {{ ternary $s.router $s.worker (eq .role "router") }}}
    {{- else if eq .role "router" }}
    - secret: {name: {{ $name }}-router-tls, items: [{key: ca.crt, path: internal-ca.crt}, {key: tls.crt, path: router.crt}, {key: tls.key, path: router.key}]}
    - secret: {name: {{ $name }}-public-tls, items: [{key: ca.crt, path: public-ca.crt}, {key: tls.crt, path: public.crt}, {key: tls.key, path: public.key}]}
    {{- else }}
    - secret: {name: {{ $name }}-worker-tls, items: [{key: ca.crt, path: internal-ca.crt}, {key: tls.crt, path: worker.crt}, {key: tls.key, path: worker.key}]}
    {{- end }}
    - secret: {name: {{ $s.clusterSecret }}, items: [{key: cluster.secret, path: cluster.secret}]}
    {{- if and (eq .role "router") $s.apiKeys }}
    - secret: {name: {{ $s.apiKeys }}, items: [{key: keys.yaml, path: keys.yaml}]}
    {{- end }}
    - configMap: {name: {{ $name }}-security, items: [{key: security.yaml, path: security.yaml}]}
{{- end -}}

{{/* Ray's head: no replica of ours runs there. */}}
{{- define "diptych.headTemplate" -}}
{{- $v := .Values -}}
{{- $pod := mergeOverwrite (deepCopy (omit $v.pod "resources" "tolerations" "nodeSelector" "affinity" "volumes" "volumeMounts" "env" "initContainers" "extraContainers")) (deepCopy ($v.ray.head.pod | default dict)) -}}
metadata:
  labels:
    {{- include "diptych.labels" . | nindent 4 }}
    diptych.dev/role: head
    {{- with $pod.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $pod.annotations }}
  annotations: {{ toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if not $v.ray.autoscaler.enabled }}
  serviceAccountName: {{ include "diptych.serviceAccount" . }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  {{- with $v.image.pullSecrets }}
  imagePullSecrets: {{ toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- $context := dict "runAsNonRoot" true "runAsUser" 1000 "runAsGroup" 1000 "fsGroup" 1000 "seccompProfile" (dict "type" "RuntimeDefault") }}
    {{- toYaml (mergeOverwrite $context ($pod.securityContext | default dict)) | nindent 4 }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "schedulerName" }}
  {{- with index $pod $key }}
  {{ $key }}: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  containers:
    - name: ray-head
      image: {{ include "diptych.image" . | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      env:
        {{- include "diptych.environment" (dict "root" . "pod" $pod) | nindent 8 }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: 8000}  # the operator fails without one; nothing listens on it: see the Service
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      resources: {{ toYaml ($pod.resources | default dict) | nindent 8 }}
      volumeMounts:
        - {name: scratch, mountPath: /tmp}
        - {name: home, mountPath: /home/ray}
        - {name: pod, mountPath: /run/diptych}
        - {name: cache, mountPath: /var/cache/diptych}
        {{- with $pod.volumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    - {name: scratch, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: pod, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
    - {name: cache, emptyDir: {}}
    {{- with $pod.volumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end -}}
