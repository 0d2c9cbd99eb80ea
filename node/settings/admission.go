package settings

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
)

// Admission is what the head's answer to GET /v1/node?boot=ID says besides the
// settings: ID names the boot, so that its token is issued once.
type Admission struct {
	ClusterPort int    `json:"cluster_port"`    // of the head's cluster service; 0: it has none
	LinkPort    int    `json:"link_port"`       // on which nodes listen for each other
	Token       string `json:"token,omitempty"` // for Identify; empty: there is none, see Refused
	Refused     string `json:"refused,omitempty"`
	CA          string `json:"ca,omitempty"` // PEM: whom to trust
}

// Admission asks to be admitted to the cluster in this boot.
func (h *Head) Admission(ctx context.Context, boot string) (Settings, Admission, error) {
	text, err := h.do(ctx, http.MethodGet, "/v1/node?boot="+url.QueryEscape(boot), nil)
	if err != nil {
		return Settings{}, Admission{}, err
	}
	s, err := Decode(text)
	if err != nil {
		return Settings{}, Admission{}, err
	}
	var a Admission
	if err := json.Unmarshal(text, &a); err != nil {
		return Settings{}, Admission{}, fmt.Errorf("node settings: %w", err)
	}
	for name, port := range map[string]int{"cluster_port": a.ClusterPort, "link_port": a.LinkPort} {
		if port < 0 || port > 65535 {
			return Settings{}, Admission{}, fmt.Errorf("node settings: %s: bad value %d", name, port)
		}
	}
	return s, a, nil
}

// Identify exchanges a token for a certificate; without a token it renews the
// certificate of the same key. Both are PEM texts. ErrRefused says that this
// token or key is worth nothing.
func (h *Head) Identify(ctx context.Context, token string, csr []byte) (cert, ca []byte, err error) {
	body, err := json.Marshal(struct {
		Token string `json:"token"`
		CSR   string `json:"csr"`
	}{token, string(csr)})
	if err != nil {
		return nil, nil, err
	}
	text, err := h.do(ctx, http.MethodPost, "/v1/node/identity", body)
	if err != nil {
		return nil, nil, err
	}
	var answer struct {
		Certificate string `json:"certificate"`
		CA          string `json:"ca"`
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return nil, nil, fmt.Errorf("certificate from the head: %w", err)
	}
	return []byte(answer.Certificate), []byte(answer.CA), nil
}
