package httpboot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"

	"krgimage/pxe/nodes"
	"krgimage/services/admission"
	"krgimage/services/identity"
)

// How a node gets its identity:
//
//	GET /v1/node?boot=ID       → settings with the boot token; ID is the kernel's
//	                             /proc/sys/kernel/random/boot_id
//	POST /v1/node/identity     {"token":"…","csr":"PEM"}
//	                           → {"certificate":"PEM","ca":"PEM"}
//
// An empty token renews, see admission.Desk.Redeem. 403 says that asking again is
// of no use with this token, 409 that the node id is in use, 503 to try again.

// Admission is what the server needs of the admission desk.
type Admission interface {
	Offer(to identity.Binding) (token string, err error)
	Redeem(ctx context.Context, from identity.Binding, token string, csr []byte) (cert []byte, err error)
	Bundle() []byte
	Refuse(what string, whom identity.Binding, why error)
}

// Cluster is what a node's settings say of the cluster service.
type Cluster struct {
	Address  netip.AddrPort `json:"address"`   // of the head's cluster service
	LinkPort int            `json:"link_port"` // TCP port of every node for other nodes
	CA       string         `json:"ca"`        // PEM; the authority to trust
	Token    string         `json:"token,omitempty"`
	Wait     string         `json:"wait,omitempty"` // why there is no token, for people
}

// maxIdentityBody is the size of an identity request in bytes; real ones have 600.
const maxIdentityBody = 8 << 10

// privileged is the first port that every user of a node can use
// (net.ipv4.ip_unprivileged_port_start). The container shares the node's address
// with stage 1, so the port tells root from the users.
const privileged = 1024

func fromRoot(r *http.Request) bool {
	a, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && a.Port() < privileged
}

// cluster is the part of the settings that is about the cluster.
func (s *Server) cluster(r *http.Request, n nodes.Node) *Cluster {
	if s.cfg.Admission == nil {
		return nil
	}
	network := s.cfg.Cluster.Network
	c := &Cluster{
		Address:  netip.AddrPortFrom(network.Head, uint16(network.ClusterPort)),
		LinkPort: network.LinkPort,
		CA:       string(s.cfg.Admission.Bundle()),
	}
	boot := r.URL.Query().Get("boot")
	if boot == "" {
		return c // somebody who looks, not a machine that boots
	}
	to := binding(n)
	if to.Boot = boot; !fromRoot(r) {
		s.cfg.Admission.Refuse("token", to, admission.ErrUnprivileged)
		c.Wait = admission.ErrUnprivileged.Error()
		return c
	}
	token, err := s.cfg.Admission.Offer(to)
	if err != nil {
		c.Wait = err.Error()
	}
	c.Token = token
	return c
}

func binding(n nodes.Node) identity.Binding {
	return identity.Binding{MAC: string(n.MAC), Address: n.Address, Node: n.ID}
}

// IdentityRequest is the body of POST /v1/node/identity.
type IdentityRequest struct {
	Token string `json:"token"`
	CSR   string `json:"csr"` // PEM
}

// ParseIdentity reads the body of an identity request. The certificate request
// itself is checked by who signs it.
func ParseIdentity(body []byte) (IdentityRequest, error) {
	var request IdentityRequest
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&request); err != nil {
		return IdentityRequest{}, fmt.Errorf("not an identity request: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return IdentityRequest{}, errors.New("text after the identity request")
	}
	if request.CSR == "" || len(request.Token) > 128 {
		return IdentityRequest{}, errors.New("an identity request needs a csr and a token of its usual size")
	}
	return request, nil
}

// IdentityAnswer is the answer to POST /v1/node/identity.
type IdentityAnswer struct {
	Certificate string `json:"certificate"` // PEM
	CA          string `json:"ca"`          // PEM
}

func (s *Server) identity(w http.ResponseWriter, r *http.Request) {
	n, ok := s.node(w, r)
	if !ok {
		return
	}
	refuse := func(status int, err error) { http.Error(w, err.Error(), status) }
	if !fromRoot(r) {
		s.cfg.Admission.Refuse("certificate", binding(n), admission.ErrUnprivileged)
		refuse(http.StatusForbidden, admission.ErrUnprivileged)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxIdentityBody))
	var request IdentityRequest
	if err == nil {
		request, err = ParseIdentity(body)
	}
	if err != nil {
		s.cfg.Admission.Refuse("certificate", binding(n), fmt.Errorf("%w: %w", err, identity.ErrMalformed))
		status := http.StatusBadRequest
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			status = http.StatusRequestEntityTooLarge
		}
		refuse(status, err)
		return
	}
	cert, err := s.cfg.Admission.Redeem(r.Context(), binding(n), request.Token, []byte(request.CSR))
	switch reason := admission.Reason(err); {
	case err == nil:
	case errors.Is(err, admission.ErrAlive):
		refuse(http.StatusConflict, err)
		return
	case errors.Is(err, identity.ErrMalformed):
		refuse(http.StatusBadRequest, err)
		return
	case errors.Is(err, identity.ErrWrongAddress):
		refuse(http.StatusForbidden, identity.ErrWrongAddress) // not whose it is
		return
	case reason != admission.Other:
		refuse(http.StatusForbidden, err)
		return
	default: // the store's trouble, logged there
		refuse(http.StatusServiceUnavailable, errors.New("the head can't admit anybody at the moment"))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(IdentityAnswer{string(cert), string(s.cfg.Admission.Bundle())})
}
