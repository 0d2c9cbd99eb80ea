package head

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"krgimage/configs"
	"krgimage/pxe/httpboot"
	"krgimage/pxe/nodes"
	"krgimage/services/identity"
	"krgimage/services/state/etcd"
)

// fileServer is an NFS that notes whom it dropped.
type fileServer struct{ dropped chan netip.Addr }

func (f fileServer) Serve(ctx context.Context, l net.Listener) error { return untilDone(ctx, l) }
func (f fileServer) Drop(a netip.Addr)                               { f.dropped <- a }

// rootClient speaks HTTP from a port that only root may use.
func rootClient(t *testing.T) *http.Client {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root may use ports below 1024")
	}
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		for port := 1023; port > 600; port-- {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}}
			if conn, err := d.DialContext(ctx, network, addr); err == nil {
				return conn, nil
			}
		}
		return nil, errors.New("no port")
	}}}
}

const testMAC = configs.MAC("52:54:00:00:00:0a")

// TestAdmitAndRevoke takes a machine through its life: settings with a token, a
// certificate, the cluster service, revoked, admitted again.
func TestAdmitAndRevoke(t *testing.T) {
	client := rootClient(t)
	cfg := config(t)
	files := fileServer{make(chan netip.Addr, 1)}
	cfg.NFS = files
	h, stop := run(t, cfg)
	defer stop()
	n, err := h.Nodes().Assign(testMAC) // node 1 has the address 127.0.0.1
	if err != nil {
		t.Fatal(err)
	}
	h.Nodes().Leased(testMAC, time.Now().Add(time.Hour))
	network := cfg.Network.(*loopback)
	web := "http://" + network.tcp[cfg.Cluster.Network.HTTPPort].Addr().String()
	settings := func(c *http.Client, boot string) (s httpboot.Settings, status int) {
		resp, err := c.Get(web + "/v1/node?boot=" + boot)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		json.NewDecoder(resp.Body).Decode(&s)
		return s, resp.StatusCode
	}
	certify := func(c *http.Client, token string, csr []byte) (a httpboot.IdentityAnswer, status int) {
		body, _ := json.Marshal(httpboot.IdentityRequest{Token: token, CSR: string(csr)})
		resp, err := c.Post(web+"/v1/node/identity", "application/json", strings.NewReader(string(body)))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		json.NewDecoder(resp.Body).Decode(&a)
		return a, resp.StatusCode
	}
	// A user of the node has its address, too, but no port of root's.
	if s, _ := settings(http.DefaultClient, "11111111-1111"); s.Cluster == nil || s.Cluster.Token != "" || s.Cluster.Wait == "" {
		t.Errorf("settings for a user: %+v", s.Cluster)
	}
	if s, _ := settings(client, ""); s.Cluster.Token != "" {
		t.Error("settings without a boot hold a token")
	}
	s, _ := settings(client, "11111111-1111")
	if s.Cluster.Token == "" || s.Cluster.CA == "" || s.Cluster.Address.Port() != 7470 {
		t.Fatalf("settings: %+v", s.Cluster)
	}
	holder, err := identity.NewHolder(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := holder.Request()
	if err != nil {
		t.Fatal(err)
	}
	if _, status := certify(http.DefaultClient, s.Cluster.Token, csr); status != http.StatusForbidden {
		t.Errorf("a user of the node redeemed the token: %d", status)
	}
	if _, status := certify(client, "guess", csr); status != http.StatusForbidden {
		t.Errorf("a token that was never issued: %d", status)
	}
	if _, status := certify(client, s.Cluster.Token, []byte("no request")); status != http.StatusBadRequest {
		t.Errorf("a malformed request: %d", status)
	}
	a, status := certify(client, s.Cluster.Token, csr)
	if status != http.StatusOK {
		t.Fatalf("certificate: %d", status)
	}
	if err := holder.Accept([]byte(a.Certificate), []byte(s.Cluster.CA)); err != nil {
		t.Fatal(err)
	}
	if id, _ := holder.ID(); id != (identity.ID{Session: 1, Node: n.ID, Boot: "11111111-1111"}) {
		t.Errorf("certificate of %v", id)
	}
	thief, err := identity.NewHolder(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	other, err := thief.Request()
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{s.Cluster.Token, ""} {
		if _, status := certify(client, token, other); status != http.StatusForbidden {
			t.Errorf("another key with token %q: %d", token, status)
		}
	}
	if again, _ := settings(client, "11111111-1111"); again.Cluster.Token != "" {
		t.Error("a second token in one boot")
	}
	if _, status := certify(client, "", csr); status != http.StatusOK {
		t.Errorf("renewal: %d", status)
	}

	service := network.tcp[cfg.Cluster.Network.ClusterPort].Addr().String()
	dial := func() error {
		conn, err := tlsDial(service, holder)
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := dial(); err != nil {
		t.Errorf("a member at the cluster service: %v", err)
	}

	control, err := Dial(t.Context(), cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	for _, bad := range []func() (nodes.Node, error){
		func() (nodes.Node, error) { return control.Revoke(t.Context(), "", 77) },
		func() (nodes.Node, error) { return control.Revoke(t.Context(), "02:00:00:00:00:01", 0) },
		func() (nodes.Node, error) { return control.Admit(t.Context(), "", 77) },
	} {
		if _, err := bad(); err == nil || !strings.Contains(err.Error(), nodes.ErrNoMachine.Error()) {
			t.Errorf("a machine that isn't there: %v", err)
		}
	}
	if got, err := control.Revoke(t.Context(), "", n.ID); err != nil || got.Admission != nodes.Revoked || !got.LeaseUntil.IsZero() {
		t.Errorf("revoked: %+v, %v", got, err)
	}
	select {
	case got := <-files.dropped:
		if got != n.Address {
			t.Errorf("the file server dropped %v", got)
		}
	default:
		t.Error("the file server keeps the connections of a revoked node")
	}
	if err := dial(); err == nil {
		t.Error("a revoked node got through to the cluster service")
	}
	if _, status := settings(client, "22222222-2222"); status != http.StatusForbidden {
		t.Errorf("settings for a revoked node: %d", status)
	}
	if _, status := certify(client, "", csr); status != http.StatusForbidden {
		t.Errorf("renewal by a revoked node: %d", status)
	}
	if got, err := control.Admit(t.Context(), "", n.ID); err != nil || got.ID != n.ID || got.Admission != nodes.Admitted {
		t.Errorf("admitted again: %+v, %v", got, err)
	}
	h.Nodes().Leased(testMAC, time.Now().Add(time.Hour))
	if s, _ := settings(client, "22222222-2222"); s.Cluster == nil || s.Cluster.Token == "" {
		t.Error("admitted again, and gets no token")
	}
	if err := dial(); err == nil {
		t.Error("the certificate from before the revocation is good again")
	}
	if refused := h.Desk().Refused(); refused["not_admitted"] == 0 || refused["token_unknown"] == 0 || refused["token_used"] == 0 || refused["unprivileged"] == 0 || refused["malformed"] == 0 {
		t.Errorf("refusals counted: %v", refused)
	}
}

// TestDamagedState starts the head on damaged authorities and state stores.
func TestDamagedState(t *testing.T) {
	cfg := config(t)
	h, stop := run(t, cfg)
	before := h.Desk().Bundle()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	head := filepath.Join(cfg.StateDir, "head")
	start := func() error {
		cfg.Network = &loopback{}
		h, err := New(cfg)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		return h.Run(ctx, cancel)
	}
	for name, damage := range map[string]func() error{
		"key":                             func() error { return os.WriteFile(filepath.Join(head, "ca", "ca.key"), []byte("x"), 0o600) },
		"no key":                          func() error { return os.Remove(filepath.Join(head, "ca", "ca.key")) },
		"certificate":                     func() error { return os.Truncate(filepath.Join(head, "ca", "ca.crt"), 100) },
		"open key":                        func() error { return os.Chmod(filepath.Join(head, "ca", "ca.key"), 0o644) },
		"no authority beside the members": func() error { return os.RemoveAll(filepath.Join(head, "ca")) },
		"state store":                     func() error { return os.Truncate(filepath.Join(head, "etcd", "member", "snap", "db"), 5000) },
	} {
		t.Run(name, func(t *testing.T) {
			saved := filepath.Join(t.TempDir(), "head")
			if err := os.CopyFS(saved, os.DirFS(head)); err != nil {
				t.Fatal(err)
			}
			os.Chmod(filepath.Join(saved, "ca", "ca.key"), 0o600) // CopyFS opens modes up
			defer func() {
				os.RemoveAll(head)
				os.Rename(saved, head)
			}()
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			err := start()
			if err == nil || !strings.Contains(err.Error(), "backup") || !strings.Contains(err.Error(), "reboot every node") {
				t.Errorf("the error doesn't say what to do: %v", err)
			}
			ca, store := (*identity.DirError)(nil), (*etcd.DirError)(nil)
			t.Log(fmt.Sprint(err), errors.As(err, &ca), errors.As(err, &store))
		})
	}
	h, stop = run(t, cfg)
	defer stop()
	if string(h.Desk().Bundle()) != string(before) {
		t.Error("another authority after a restart")
	}
}

// TestManual has a machine wait for the admin.
func TestManual(t *testing.T) {
	cfg := config(t)
	cfg.Cluster.Nodes.Unknown = "manual"
	h, stop := run(t, cfg)
	defer stop()
	if _, err := h.Nodes().Assign(testMAC); !errors.Is(err, nodes.ErrWaiting) {
		t.Fatalf("an unknown machine: %v", err)
	}
	control, err := Dial(t.Context(), cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	all, err := control.Nodes(t.Context())
	if err != nil || len(all) != 1 || all[0].Admission != nodes.Waiting || all[0].ID != nodes.NoID {
		t.Fatalf("%+v, %v", all, err)
	}
	n, err := control.Admit(t.Context(), testMAC, 0)
	if err != nil || n.ID != 1 {
		t.Fatalf("%+v, %v", n, err)
	}
	if n, err := h.Nodes().Assign(testMAC); err != nil || n.ID != 1 {
		t.Errorf("after it was admitted: %+v, %v", n, err)
	}
}

func tlsDial(addr string, holder *identity.Holder) (net.Conn, error) {
	config := identity.ClientTLS(holder, identity.HeadNode, identity.Anyone)
	config.NextProtos = []string{"h2"} // the service speaks gRPC
	conn, err := tls.Dial("tcp", addr, config)
	if err != nil {
		return nil, err
	}
	// In TLS 1.3 the server judges the client after the client's handshake has
	// ended: its first bytes tell.
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}
