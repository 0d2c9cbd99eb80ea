// Package settings is what the head node tells a node about itself, and what
// stage 1 leaves behind for PID 1.
//
// The head knows a node by the source address of its connection, so there is
// nothing to log in with. The one secret in the answer is the boot token, and the
// head gives it only to a port that no user of the node can use. Head is the client
// of that interface; a head without it (a plain NFS and DHCP server) is
// ErrNoInterface, and the node lives from its kernel command line.
package settings

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"strings"
	"time"

	"krgimage/node/bootlog"
	"krgimage/node/cmdline"
)

// Settings is the head's answer to GET /v1/node.
type Settings struct {
	SessionID   int          `json:"session_id"`
	NodeID      int          `json:"node_id"`
	Hostname    string       `json:"hostname"`
	Domain      string       `json:"domain"`
	MAC         string       `json:"mac"`
	Address     netip.Prefix `json:"address"`
	Head        netip.Addr   `json:"head"`
	Time        time.Time    `json:"time"` // the head's clock when it answered
	NFS         NFS          `json:"nfs"`
	Mounts      []Mount      `json:"mounts,omitempty"` // from the root's server
	RescueShell bool         `json:"rescue_shell"`     // a shell may be offered on the node's own console
	Cluster     *Cluster     `json:"cluster,omitempty"`
}

// Cluster says where the cluster service is; nil in Settings: there is none.
type Cluster struct {
	Address  netip.AddrPort `json:"address"`         // of the head's cluster service
	LinkPort int            `json:"link_port"`       // TCP port of every node for other nodes
	CA       string         `json:"ca"`              // PEM; the authority to trust
	Token    string         `json:"token,omitempty"` // for one certificate; never kept
	Wait     string         `json:"wait,omitempty"`  // why there is no token
}

// NFS says where the shared root is.
type NFS struct {
	Server  string   `json:"server"`
	Port    int      `json:"port"` // of NFS, and of MOUNT unless an option or the portmapper says otherwise
	Path    string   `json:"path"`
	Options []string `json:"options,omitempty"` // of mount(2)
}

// Mount is a directory that the container has besides the root.
type Mount struct {
	Path     string `json:"path"` // as exported
	At       string `json:"at"`
	ReadOnly bool   `json:"readonly,omitempty"`
}

// maxMounts is more than a configuration can reasonably have.
const maxMounts = 64

// cleanPath reports whether p is absolute, says where it is without detours,
// and can't be taken for more than one word.
func cleanPath(p string) bool {
	return strings.HasPrefix(p, "/") && path.Clean(p) == p && !strings.ContainsAny(p, ", \t\n\x00")
}

// Errors that a caller decides on.
var (
	ErrNoInterface = errors.New("the head has no node interface")
	ErrRefused     = errors.New("the head doesn't know this node")
	ErrNodeInUse   = errors.New("another machine with this node's id is running")
)

// maxAnswer bounds the head's answer; it is a few hundred bytes.
const maxAnswer = 64 << 10

// hostname is a DNS label or a dotted row of them, RFC 1123 section 2.1.
var hostname = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$`)

// ValidHostname reports whether s can be a host or domain name.
func ValidHostname(s string) bool { return len(s) <= 253 && hostname.MatchString(s) }

// Decode reads the head's answer and checks every field that the node acts on.
// Unknown fields are fine: a newer head may say more.
func Decode(text []byte) (Settings, error) {
	var s Settings
	if err := json.Unmarshal(text, &s); err != nil {
		return Settings{}, fmt.Errorf("node settings: %w", err)
	}
	bad := func(field string, value any) error {
		return fmt.Errorf("node settings: %s: bad value %v", field, value)
	}
	switch {
	case s.SessionID < cmdline.MinSession || s.SessionID > cmdline.MaxSession:
		return Settings{}, bad("session_id", s.SessionID)
	case s.NodeID < 0 || s.NodeID > cmdline.MaxNode:
		return Settings{}, bad("node_id", s.NodeID)
	case s.Hostname != "" && !ValidHostname(s.Hostname):
		return Settings{}, bad("hostname", fmt.Sprintf("%q", s.Hostname))
	case s.Domain != "" && !ValidHostname(s.Domain):
		return Settings{}, bad("domain", fmt.Sprintf("%q", s.Domain))
	case s.NFS.Path != "" && !strings.HasPrefix(s.NFS.Path, "/"):
		return Settings{}, bad("nfs.path", fmt.Sprintf("%q", s.NFS.Path))
	case s.NFS.Port < 0 || s.NFS.Port > 65535:
		return Settings{}, bad("nfs.port", s.NFS.Port)
	case s.Cluster != nil && (!s.Cluster.Address.IsValid() || s.Cluster.Address.Port() == 0):
		return Settings{}, bad("cluster.address", s.Cluster.Address)
	case s.Cluster != nil && (s.Cluster.LinkPort < 1 || s.Cluster.LinkPort > 65535):
		return Settings{}, bad("cluster.link_port", s.Cluster.LinkPort)
	case strings.ContainsAny(strings.Join(s.NFS.Options, ""), ", \t\n"):
		return Settings{}, bad("nfs.options", s.NFS.Options)
	case len(s.Mounts) > maxMounts:
		return Settings{}, bad("mounts", fmt.Sprintf("%d of them", len(s.Mounts)))
	case strings.ContainsAny(s.NFS.Server+s.NFS.Path, ", \t\n"):
		return Settings{}, bad("nfs", fmt.Sprintf("%q", s.NFS.Server+":"+s.NFS.Path))
	}
	for _, m := range s.Mounts {
		if !cleanPath(m.Path) || !cleanPath(m.At) || m.At == "/" {
			return Settings{}, bad("mounts", fmt.Sprintf("%q at %q", m.Path, m.At))
		}
	}
	return s, nil
}

// Head is the client of a head node.
type Head struct {
	url  string
	http *http.Client
}

// NewHead returns a client for the head at rawURL, for example
// http://10.77.0.254:80.
func NewHead(rawURL string) (*Head, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Scheme != "http" || u.Host == "" {
		return nil, fmt.Errorf("head URL %q: want http://ADDRESS:PORT", rawURL)
	}
	return &Head{
		url: strings.TrimRight(rawURL, "/"),
		// The head is on the boot network; a proxy is never meant.
		http: &http.Client{
			Transport: &http.Transport{DialContext: dialAsRoot, IdleConnTimeout: 5 * time.Second, MaxIdleConns: 1},
			Timeout:   10 * time.Second,
		},
	}, nil
}

// Fetch asks for this node's settings. With the name of this boot (BootID) they
// hold a boot token if the node has no identity yet. Errors are ErrNoInterface,
// ErrRefused, or something that another attempt may cure.
func (h *Head) Fetch(ctx context.Context, boot string) (Settings, error) {
	path := "/v1/node"
	if boot != "" {
		path += "?boot=" + url.QueryEscape(boot)
	}
	text, err := h.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return Settings{}, err
	}
	return Decode(text)
}

// Certify exchanges a boot token and a certificate request for a certificate and
// the authority's; all but the token is PEM. An empty token renews. Errors are
// ErrNoInterface, ErrRefused (this token is of no use), ErrNodeInUse, or something
// that another attempt may cure.
func (h *Head) Certify(ctx context.Context, token string, request []byte) (cert, authority []byte, err error) {
	body, err := json.Marshal(struct {
		Token string `json:"token"`
		CSR   string `json:"csr"`
	}{token, string(request)})
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
		return nil, nil, fmt.Errorf("node identity: %w", err)
	}
	return []byte(answer.Certificate), []byte(answer.CA), nil
}

// PostStage posts one stage of the boot. bootlog.ErrRejected says that another
// attempt is useless.
func (h *Head) PostStage(ctx context.Context, s bootlog.Stage) error {
	body, err := json.Marshal(s)
	if err != nil {
		return err
	}
	_, err = h.do(ctx, http.MethodPost, "/v1/node/stage", body)
	if errors.Is(err, ErrNoInterface) || errors.Is(err, ErrRefused) {
		return fmt.Errorf("%w: %w", bootlog.ErrRejected, err)
	}
	return err
}

func (h *Head) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, h.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := h.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	switch code := resp.StatusCode; {
	case code == http.StatusForbidden || code == http.StatusUnauthorized:
		return nil, fmt.Errorf("%s%s: %w (%s)", h.url, path, ErrRefused, firstLine(text))
	case code == http.StatusConflict:
		return nil, fmt.Errorf("%s%s: %w", h.url, path, ErrNodeInUse)
	case code == http.StatusNotFound || code == http.StatusMethodNotAllowed || code == http.StatusNotImplemented:
		return nil, fmt.Errorf("%s%s: %w", h.url, path, ErrNoInterface)
	case code == http.StatusBadRequest:
		return nil, fmt.Errorf("%s%s: %w (%s)", h.url, path, bootlog.ErrRejected, firstLine(text))
	case code/100 != 2:
		return nil, fmt.Errorf("%s%s: head answers %s", h.url, path, resp.Status)
	case err != nil:
		return nil, fmt.Errorf("%s%s: %w", h.url, path, err)
	}
	return text, nil
}

func firstLine(text []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	return line
}
