{{- define "loraplex.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change: selectors use them. */}}
{{- define "loraplex.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loraplex.labels" -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "loraplex.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "loraplex.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* What would not start, or would serve each client from other adapters, is refused here. */}}
{{- define "loraplex.check" -}}
{{- $auth := .Values.auth -}}
{{- if not (or $auth.apiKeySecret.name $auth.keysFileSecret.name) -}}
{{- fail "set auth.apiKeySecret.name or auth.keysFileSecret.name: the server does not start without a key" -}}
{{- end -}}
{{- if and (eq .Values.mode "server") (gt (int .Values.replicas) 1) (not .Values.catalogue.url) -}}
{{- fail "replicas > 1 needs catalogue.url: without it each server has adapters of its own" -}}
{{- end -}}
{{- if and (eq .Values.mode "ray") (not .Values.catalogue.url) -}}
{{- fail "mode ray needs catalogue.url: gateways and engines on several nodes share adapters through it" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not $auth.metricsKeySecret.name) -}}
{{- fail "serviceMonitor.enabled needs auth.metricsKeySecret.name, with which Prometheus reads /metrics" -}}
{{- end -}}
{{- end -}}
