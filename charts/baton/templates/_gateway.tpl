{{/* Variables of the gateway. Takes (dict "root" $ "values" the gateway's values). */}}
{{- define "baton.gateway.env" -}}
{{- include "baton.commonEnv" . }}
- name: BATON_PORT
  value: "8000"
- name: BATON_GRPC_PORT
  value: "8001"
# On the pod's loopback: for commands that run in it, or come through a forwarded port. In no Service.
- name: BATON_ADMIN_PORT
  value: "8002"
- name: BATON_ADMIN_URL
  value: http://127.0.0.1:8002
{{- if .values.adminKeys.existingSecret }}
- name: BATON_ADMIN_KEY_FILE
  value: /etc/baton/admin-keys/admin-keys
{{- end }}
- name: BATON_PLACEMENT
  value: {{ .values.placement }}
- name: BATON_MAX_CONCURRENT_REQUESTS
  value: {{ int64 .values.maxConcurrentRequests | quote }}
- name: BATON_REQUEST_TIMEOUT_S
  value: {{ int64 .values.requestTimeoutSeconds | quote }}
- name: BATON_WORKER_WAIT_S
  value: {{ .values.workerWaitSeconds | quote }}
- name: BATON_FETCH
  value: {{ .values.fetch | quote }}
{{- if .values.apiKeys.existingSecret }}
- name: BATON_API_KEY_FILE
  value: /etc/baton/api-keys/api-keys
{{- end }}
{{- if .values.tls.existingSecret }}
- name: BATON_SSL_CERTFILE
  value: /etc/baton/public-tls/tls.crt
- name: BATON_SSL_KEYFILE
  value: /etc/baton/public-tls/tls.key
{{- end }}
{{- if .values.tls.clientCASecret }}
- name: BATON_SSL_CA_CERTS
  value: /etc/baton/client-ca/ca.crt
{{- end }}
{{- if .values.tenants.existingSecret }}
- name: BATON_TENANTS_FILE
  value: /etc/baton/tenants/tenants.yaml
{{- end }}
{{- end -}}
