// Package httpboot is the head node's HTTP server. It has two sorts of clients:
// boot loaders, which fetch the boot script, kernel and initramfs (and UEFI
// firmware that boots by HTTP, its loader), and the nodes themselves, which ask
// for their settings and report how far they are.
//
//	GET  /boot.ipxe          boot script of the machine that asks (?mac= if it has no lease)
//	GET  /vmlinuz            kernel
//	GET  /initramfs.img      initramfs
//	GET  /boot/NAME          loaders
//	GET  /v1/node            the node's settings, see Settings
//	POST /v1/node/stage      a stage of the node's boot, see StageReport
//	POST /v1/node/identity   a boot token for a certificate, see identity.go
//
// A node is known by the address it asks from: the registry knows which machine
// was leased it. The one secret that is served here is the boot token, and only
// to the kernel's own side of a node: to ports that no user of it can use.
// The kernel command line is made here too (cmdline.go), for iPXE and pxelinux
// alike.
package httpboot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path"
	"strings"
	"time"

	"golang.org/x/net/netutil"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

// Registry is what the server needs of the node registry.
type Registry interface {
	Lookup(configs.MAC) (nodes.Node, bool)
	ByAddress(netip.Addr) (nodes.Node, bool)
	Saw(mac configs.MAC, s nodes.Stage, detail string)
	Report(mac configs.MAC, s nodes.Stage, uptime time.Duration, detail string) error
}

// Config is what a Server works from.
type Config struct {
	Cluster   configs.Cluster
	Nodes     Registry
	Kernel    string            // path of vmlinuz
	Initramfs string            // path of initramfs.img
	Loaders   map[string]string // name below /boot/ to path
	Root      Root              // where the nodes' root is
	Mounts    []Mount           // what nodes mount besides it
	Admission Admission         // nil: there is no cluster service
	Log       *slog.Logger      // nil: silent
	Now       func() time.Time  // nil: time.Now
}

// Server answers boot loaders and nodes.
type Server struct {
	cfg Config
	log *slog.Logger
	mux *http.ServeMux
}

// Limits. A node under emulation that loads its initramfs beside many others is
// slow, a client that holds a connection for nothing is slower.
const (
	maxConns        = 1024
	maxHeader       = 16 << 10 // bytes
	maxStageBody    = 4 << 10  // bytes
	headerTimeout   = 15 * time.Second
	idleTimeout     = 60 * time.Second
	shortTimeout    = 30 * time.Second // everything but files
	transferTimeout = 15 * time.Minute
	stopGrace       = 2 * time.Second
)

// New returns a server.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Server{cfg: cfg, log: cfg.Log.With("component", "http"), mux: http.NewServeMux()}
	s.mux.HandleFunc("GET /boot.ipxe", s.script)
	s.mux.HandleFunc("GET /vmlinuz", s.file(cfg.Kernel, nodes.StageKernel))
	s.mux.HandleFunc("GET /initramfs.img", s.file(cfg.Initramfs, nodes.StageInitramfs))
	for name, p := range cfg.Loaders {
		s.mux.HandleFunc("GET /boot/"+path.Base(name), s.file(p, nodes.StageLoader))
	}
	s.mux.HandleFunc("GET /v1/node", s.settings)
	s.mux.HandleFunc("POST /v1/node/stage", s.stage)
	if cfg.Admission != nil {
		s.mux.HandleFunc("POST /v1/node/identity", s.identity)
	}
	return s
}

// Handler is the server without its connections.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.cfg.Cluster.Network.Subnet.Contains(remote(r)) {
			http.Error(w, "only the cluster's own subnet is served here", http.StatusForbidden)
			return
		}
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(shortTimeout))
		s.mux.ServeHTTP(w, r)
	})
}

// Serve answers on l until ctx ends, and closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       shortTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
		defer cancel()
		if server.Shutdown(grace) != nil {
			server.Close()
		}
	})
	err := server.Serve(netutil.LimitListener(l, maxConns))
	if stop() {
		server.Close()
		return fmt.Errorf("HTTP: %w", err)
	}
	<-ended
	return nil
}

// script sends the boot script. The lease says which machine asks; the parameter
// serves a loader whose address is not from here.
func (s *Server) script(w http.ResponseWriter, r *http.Request) {
	n, ok := s.cfg.Nodes.ByAddress(remote(r))
	if !ok {
		var mac configs.MAC
		if mac, ok = parseMAC(r.URL.Query().Get("mac")); ok {
			n, ok = s.cfg.Nodes.Lookup(mac)
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if !ok {
		// Sent as a script, because a person in front of the machine can read it.
		s.log.Warn("boot script asked for by an unknown machine", "client", r.RemoteAddr, "mac", nodes.Clean(r.URL.Query().Get("mac")))
		io.WriteString(w, refusal)
		return
	}
	text := Script(&s.cfg.Cluster, n, s.cfg.Root)
	if _, err := io.WriteString(w, text); err == nil && r.Method == http.MethodGet {
		s.cfg.Nodes.Saw(n.MAC, nodes.StageScript, "")
	}
}

// parseMAC reads a MAC with colons or dashes.
func parseMAC(s string) (configs.MAC, bool) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return "", false
	}
	return configs.MAC(hw.String()), true
}

// Settings are a node's settings, the answer to GET /v1/node.
type Settings struct {
	SessionID   int          `json:"session_id"`
	NodeID      int          `json:"node_id"`
	Hostname    string       `json:"hostname"`
	Domain      string       `json:"domain"`
	MAC         configs.MAC  `json:"mac"`
	Address     netip.Prefix `json:"address"`
	Head        netip.Addr   `json:"head"`
	Time        time.Time    `json:"time"` // the head's clock, RFC 3339 with nanoseconds
	NFS         NFS          `json:"nfs"`
	Mounts      []Mount      `json:"mounts,omitempty"`
	RescueShell bool         `json:"rescue_shell"`
	Cluster     *Cluster     `json:"cluster,omitempty"` // nil: there is no cluster service
}

// NFS says where a node's root is.
type NFS struct {
	Server  netip.Addr `json:"server"`
	Port    int        `json:"port"`
	Path    string     `json:"path"`
	Options []string   `json:"options,omitempty"`
}

// Mount is a directory besides the root, from the root's server.
type Mount struct {
	Path     string `json:"path"` // as exported
	At       string `json:"at"`   // where a node has it
	ReadOnly bool   `json:"readonly,omitempty"`
}

func (s *Server) settings(w http.ResponseWriter, r *http.Request) {
	n, ok := s.node(w, r)
	if !ok {
		return
	}
	c := &s.cfg.Cluster
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(Settings{
		SessionID:   c.SessionID,
		NodeID:      n.ID,
		Hostname:    n.Hostname,
		Domain:      c.Name,
		MAC:         n.MAC,
		Address:     netip.PrefixFrom(n.Address, c.Network.Subnet.Bits()),
		Head:        c.Network.Head,
		Time:        s.cfg.Now(),
		NFS:         NFS(s.cfg.Root),
		Mounts:      s.cfg.Mounts,
		RescueShell: c.Initramfs.RescueShell,
		Cluster:     s.cluster(r, n),
	})
}

// StageReport is the body of POST /v1/node/stage.
type StageReport struct {
	Stage    nodes.Stage `json:"stage"`
	UptimeMS int64       `json:"uptime_ms"` // node's uptime at the stage, in milliseconds
	Detail   string      `json:"detail"`
}

// ParseStage reads the body of a stage report.
func ParseStage(body []byte) (StageReport, error) {
	var report StageReport
	if err := json.Unmarshal(body, &report); err != nil {
		return StageReport{}, fmt.Errorf("not a stage report: %w", err)
	}
	if !report.Stage.FromNode() {
		return StageReport{}, fmt.Errorf("stage %q is not one that a node reports", nodes.Clean(string(report.Stage)))
	}
	if report.UptimeMS < 0 || report.UptimeMS > maxUptimeMS {
		return StageReport{}, errors.New("uptime_ms is out of range")
	}
	return report, nil
}

// maxUptimeMS is ten years.
const maxUptimeMS = 10 * 365 * 24 * 3600 * 1000

func (s *Server) stage(w http.ResponseWriter, r *http.Request) {
	n, ok := s.node(w, r)
	if !ok {
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxStageBody))
	if err != nil {
		status := http.StatusBadRequest
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			status = http.StatusRequestEntityTooLarge
		}
		http.Error(w, "stage report: "+err.Error(), status)
		return
	}
	report, err := ParseStage(body)
	if err == nil {
		err = s.cfg.Nodes.Report(n.MAC, report.Stage, time.Duration(report.UptimeMS)*time.Millisecond, report.Detail)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// node is the machine that asks, or else the answer is given.
func (s *Server) node(w http.ResponseWriter, r *http.Request) (nodes.Node, bool) {
	n, ok := s.cfg.Nodes.ByAddress(remote(r))
	if !ok {
		http.Error(w, fmt.Sprintf("%s is not an address that this head leased", remote(r)), http.StatusForbidden)
	}
	return n, ok
}

// remote is the address a request comes from; the zero Addr if it has none.
func remote(r *http.Request) netip.Addr {
	a, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return a.Addr().Unmap()
}

const refusal = `#!ipxe
echo
echo This machine is not a node of this cluster: the head node refused it.
echo Add its MAC to nodes.table in cluster.yaml, or set nodes.unknown to discover.
echo
show net0/mac ||
sleep 30
exit 1
`

// printable keeps an argument of the configuration from becoming a second line
// of a boot script.
func printable(args []string) []string {
	var clean []string
	for _, a := range args {
		clean = append(clean, strings.Fields(nodes.Clean(a))...)
	}
	return clean
}
