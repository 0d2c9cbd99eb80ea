package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"krgimage/configs"
	"krgimage/images"
	"krgimage/images/progress"
	"krgimage/nfsroot/live"
	"krgimage/nfsroot/nfs"
	"krgimage/nfsroot/nlm"
	"krgimage/pxe/head"
)

// headNode is a head node ready to run: its image is checked, its shared root
// is there, its NFS server is open.
type headNode struct {
	*head.Head
	root  live.Root
	close []func()
}

// Close gives back what the head node holds.
func (h *headNode) Close() {
	for i := len(h.close) - 1; i >= 0; i-- {
		h.close[i]()
	}
}

// headOptions say how a command runs the head node.
type headOptions struct {
	command string // its name
	state   string // directory of its node table
	network head.Network
	nfs     string // nfsBuiltin or nfsKernel, where no existing server has the root
	force   bool   // serve beside another DHCP server
	log     *slog.Logger
	report  *progress.Reporter
}

// openHead brings the shared root up to the image and makes the head node that
// serves both. Only one head serves the shared root of a state directory.
func (a *app) openHead(ctx context.Context, c configs.Cluster, im *images.Image, o headOptions) (_ *headNode, err error) {
	state, err := a.state()
	if err != nil {
		return nil, err
	}
	h := &headNode{}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	unlock, err := images.Lock(filepath.Join(state, "head", "lock"), o.command)
	if err != nil {
		return nil, err
	}
	h.close = append(h.close, unlock)

	root, err := a.openRoot(ctx, h, c, state, im, o)
	if err != nil {
		return nil, err
	}
	h.Head, err = head.New(head.Config{
		Cluster: c, NFS: root.server, Root: root.at, Mounts: root.mounts, Locks: root.locks, NFSStats: root.stats, Metrics: root.metrics, StateDir: o.state, Network: o.network, Force: o.force, Log: o.log,
		Image: head.Image{Kernel: im.Path(images.KernelFile), Initramfs: im.Path(images.InitramfsFile), LoaderDir: im.Path(images.LoaderDir)},
	})
	return h, err
}

// metrics serves the counters of the head node in Prometheus form.
func metrics(server *nfs.Server) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(server.Metrics(), collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
}

// openLocks opens the lock manager of the shared root. What it holds outlives
// this process, in the state directory.
func openLocks(c configs.Cluster, server *nfs.Server, o headOptions, allow func(netip.Addr) bool) (*nlm.Server, error) {
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("which boot of this machine it is: %w", err)
	}
	return nlm.New(nlm.Config{
		Files: server, Journal: filepath.Join(o.state, "head", "locks"), BootID: strings.TrimSpace(string(bootID)),
		Name: c.Network.Head.String(), Dial: o.network.DialTCP, Allow: allow, Log: o.log,
	})
}

// requireRoot says before anything is begun that a command can't do without.
func requireRoot(command string) error {
	if os.Geteuid() == 0 {
		return nil
	}
	return fmt.Errorf("'krgimage %s' must run as root: it handles files of root and of every user as they are, and serving takes ports below 1024\n  fix: sudo; 'krgimage build' and 'krgimage trial' need no root", command)
}

// checkedImage opens the current image and compares it with its manifest, so
// that a truncated file is found here and not by a node that can't boot.
func checkedImage(state string, report *progress.Reporter) (*images.Image, error) {
	im, err := images.Current(state)
	if err != nil {
		return nil, err
	}
	step := report.Step("Image check")
	if err := im.Verify(); err != nil {
		return nil, step.Fail(err)
	}
	step.Done("%s, kernel %s", im.Manifest.BuildID, im.Manifest.Kernel.Release)
	return im, nil
}

// syncRoot brings the shared root, whose trees are in the directory (the state
// directory's own if empty), up to the image and the configuration.
func (a *app) syncRoot(ctx context.Context, c configs.Cluster, state, trees string, im *images.Image, o headOptions) (live.Root, error) {
	_, public, err := clientKey(state)
	if err != nil {
		return live.Root{}, err
	}
	artefact := func(name string) live.Artefact { return live.Artefact{Path: im.Path(name), Digest: im.Digest(name)} }
	root, err := live.Sync(ctx, live.Input{
		State:     state,
		Trees:     trees,
		Places:    places(c),
		Image:     live.Image{Base: artefact(images.BaseFile), Modules: artefact(images.ModulesFile), Overlay: artefact(images.OverlayFile)},
		Cluster:   c,
		ExtraKeys: []string{public},
		Hosts:     hosts(c),
		Log:       o.log,
	}, o.report)
	if err != nil {
		return live.Root{}, err
	}
	for _, line := range root.Report.Lines() {
		fmt.Fprintln(a.Err, line)
	}
	return root, a.writeKnownHosts(state, root.HostKey)
}

// hosts names the head and every node that the configuration can have.
func hosts(c configs.Cluster) []live.Host {
	list := []live.Host{{Address: c.Network.Head, Names: []string{c.Name + "-head." + c.Name, c.Name + "-head"}}}
	named := map[int]bool{}
	add := func(id int, address netip.Addr, name string) {
		named[id] = true
		list = append(list, live.Host{Address: address, Names: []string{name + "." + c.Name, name}})
	}
	for _, n := range c.Nodes.Table {
		add(n.ID, n.Address, n.Hostname)
	}
	if c.Nodes.Unknown == "discover" {
		for _, id := range c.DiscoverIDs() {
			if address, err := c.Address(id); err == nil && !named[id] {
				add(id, address, c.Hostname(id))
			}
		}
	}
	return list
}

// hostAlias is the name under which all nodes' one host key is known.
const hostAlias = "krg-cluster"

func knownHosts(state string) string { return filepath.Join(state, "ssh", "known_hosts") }

func (a *app) writeKnownHosts(state, hostKey string) error {
	line := hostAlias + " " + strings.TrimSpace(hostKey) + "\n"
	if err := renameio.WriteFile(knownHosts(state), []byte(line), 0o644); err != nil {
		return fmt.Errorf("note the cluster's host key: %w", err)
	}
	return nil
}

// isStopped tells an end that was asked for from a failure.
func isStopped(ctx context.Context, err error) bool {
	return ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled))
}
