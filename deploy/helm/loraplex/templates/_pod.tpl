{{/* The parts that all pods share: of a server, of Ray's head and of Ray's workers. */}}

{{- define "loraplex.podBasics" -}}
serviceAccountName: {{ include "loraplex.serviceAccount" . }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .Values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range .Values.topologySpreadConstraints }}
  - labelSelector:
      matchLabels: {{- include "loraplex.selector" $ | nindent 8 }}
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "loraplex.containerBasics" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
env:
  {{- with .Values.auth.apiKeySecret }}
  {{- if .name }}
  - name: LORAPLEX_API_KEY
    valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
  {{- end }}
  {{- end }}
  {{- with .Values.auth.metricsKeySecret }}
  {{- if .name }}
  - name: LORAPLEX_METRICS_KEY
    valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
  {{- end }}
  {{- end }}
  {{- if .Values.auth.keysFileSecret.name }}
  - {name: LORAPLEX_KEYS, value: /etc/loraplex-keys/keys.toml}
  {{- end }}
  {{- if .Values.catalogue.url }}
  - {name: LORAPLEX_CATALOGUE, value: {{ .Values.catalogue.url | quote }}}
  - {name: LORAPLEX_CATALOGUE_DISK, value: {{ .Values.catalogue.disk | quote }}}
  {{- end }}
  {{- if .Values.adaptersVolume }}
  - {name: LORAPLEX_ADAPTERS_DIR, value: /adapters}
  {{- end }}
  {{- if eq .Values.mode "ray" }}
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.catalogue.credentialsSecret }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
volumeMounts:
  - {name: data, mountPath: /data}
  - {name: tmp, mountPath: /tmp}
  - {name: config, mountPath: /etc/loraplex, readOnly: true}
  {{- if .Values.auth.keysFileSecret.name }}
  - {name: keys, mountPath: /etc/loraplex-keys, readOnly: true}
  {{- end }}
  {{- if .Values.adaptersVolume }}
  - {name: adapters, mountPath: /adapters, readOnly: true}
  {{- end }}
  {{- if .Values.modelVolume }}
  - {name: models, mountPath: /models, readOnly: true}
  {{- end }}
  {{- if eq .Values.mode "ray" }}
  - {name: shm, mountPath: /dev/shm}
  {{- end }}
{{- end -}}

{{- define "loraplex.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpu.count -}}
{{- $gpu := dict .Values.gpu.resource (.Values.gpu.count | int) -}}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpu) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* All but data, which is a claim of its own in mode server. */}}
{{- define "loraplex.volumes" -}}
- name: tmp
  emptyDir: {}
- name: config
  configMap: {name: {{ include "loraplex.name" . }}}
{{- if .Values.auth.keysFileSecret.name }}
- name: keys
  secret:
    secretName: {{ .Values.auth.keysFileSecret.name }}
    items: [{key: {{ .Values.auth.keysFileSecret.key }}, path: keys.toml}]
{{- end }}
{{- with .Values.adaptersVolume }}
- name: adapters
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.modelVolume }}
- name: models
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if eq .Values.mode "ray" }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: 1Gi}
{{- end }}
{{- if or (eq .Values.mode "ray") (not .Values.persistence.enabled) }}
- name: data
  emptyDir: {sizeLimit: {{ .Values.persistence.emptyDirLimit }}}
{{- end }}
{{- end -}}
