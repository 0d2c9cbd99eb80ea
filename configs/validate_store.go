package configs

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const store = "cluster.store"

// store checks the cluster service: who joins, and where the shared state is kept.
func (k *checker) store() {
	if start := k.c.Cluster.Start; start != "all" && start != "none" {
		n := k.c.Cluster.Total()
		if n < 1 || n > MaxNodeID+1 || strconv.Itoa(n) != start {
			k.bad("cluster.start", quote(start)+" is not a choice here", fmt.Sprintf("all, none, or a number of nodes from 1 to %d", MaxNodeID+1))
		}
	}
	s := k.c.Cluster.Store
	k.enum(store+".kind", s.Kind, "embedded", "heads", "etcd")
	for _, f := range []struct {
		name   string
		filled bool
		kinds  []string // that have the field
	}{
		{"name", s.Name != "", []string{"heads"}},
		{"heads", len(s.Heads) > 0, []string{"heads"}},
		{"urls", len(s.URLs) > 0, []string{"etcd"}},
		{"ca", s.CA != "", []string{"heads", "etcd"}},
		{"cert", s.Cert != "", []string{"heads", "etcd"}},
		{"key", s.Key != "", []string{"heads", "etcd"}},
	} {
		if f.filled && !slices.Contains(f.kinds, s.Kind) {
			k.bad(store+"."+f.name, "has no meaning with kind: "+s.Kind, "remove it, or set kind: "+strings.Join(f.kinds, " or "))
		}
	}
	for _, f := range []struct{ name, path string }{{"ca", s.CA}, {"cert", s.Cert}, {"key", s.Key}} {
		switch {
		case f.path == "" && s.Kind == "heads":
			k.bad(store+"."+f.name, "is missing: the heads talk to each other over TLS", "the absolute path of a PEM file")
		case f.path != "" && !filepath.IsAbs(f.path):
			k.bad(store+"."+f.name, quote(f.path)+" is not an absolute path", "for example /etc/krgimage/"+f.name+".pem")
		}
	}
	switch s.Kind {
	case "heads":
		k.heads()
	case "etcd":
		k.etcd()
	}
}

func (k *checker) heads() {
	s := k.c.Cluster.Store
	if n := len(s.Heads); n != 3 && n != 5 {
		k.bad(store+".heads", fmt.Sprintf("%d heads: more than half of them must run, so an even number or fewer than three is worse than one", n), "list three, or five")
	}
	names, urls, here := map[string]int{}, map[string]int{}, false
	for i, h := range s.Heads {
		at := index(store+".heads", i)
		if !dnsLabel.MatchString(h.Name) {
			k.bad(at+".name", quote(h.Name)+" is not a DNS label", dnsLabelHint+"a")
		}
		for _, once := range []struct {
			field, value string
			seen         map[string]int
		}{{".name", h.Name, names}, {".url", h.URL, urls}} {
			if j, ok := once.seen[once.value]; ok {
				k.bad(at+once.field, fmt.Sprintf("%s is that of %s, too", quote(once.value), index(store+".heads", j)), "each head needs its own")
			}
			once.seen[once.value] = i
		}
		here = here || h.Name == s.Name
		u, ok := k.storeURL(at+".url", h.URL, "https://192.0.2.1:7473")
		if !ok {
			continue
		}
		switch a, err := netip.ParseAddr(u.Hostname()); {
		case u.Scheme != "https":
			k.bad(at+".url", "the heads talk to each other over TLS only", "write https://")
		case err != nil:
			k.bad(at+".url", quote(u.Hostname())+" is not an address", "a head listens there: write its IP address")
		case a.IsUnspecified():
			k.bad(at+".url", u.Hostname()+" is every address of the head, those on the boot network too", "write the one that the other heads use")
		case k.c.hasSubnet() && k.c.Network.Subnet.Contains(a):
			k.bad(at+".url", fmt.Sprintf("%s is on the boot network %s, where any machine could knock", a, k.c.Network.Subnet), "give the heads a network of their own")
		}
	}
	if !here {
		k.bad(store+".name", quote(s.Name)+" is none of the heads", "which of "+store+".heads is this one?")
	}
}

func (k *checker) etcd() {
	s := k.c.Cluster.Store
	if len(s.URLs) == 0 {
		k.bad(store+".urls", "is empty", "for example [https://192.0.2.9:2379]")
	}
	for i, text := range s.URLs {
		at := index(store+".urls", i)
		u, ok := k.storeURL(at, text, "https://192.0.2.9:2379")
		if !ok {
			continue
		}
		a, err := netip.ParseAddr(u.Hostname())
		if u.Scheme == "http" && u.Hostname() != "localhost" && (err != nil || !a.IsLoopback()) {
			k.bad(at, "without TLS, anybody on the way could change the cluster's state", "write https://, or use an etcd on 127.0.0.1")
		}
	}
	k.once(store+".urls", s.URLs, same)
	if (s.Cert == "") != (s.Key == "") {
		k.bad(store+map[bool]string{true: ".cert", false: ".key"}[s.Cert == ""], "is missing: certificate and key go together", "set both or none")
	}
}

// storeURL checks the form http[s]://HOST:PORT.
func (k *checker) storeURL(field, text, example string) (*url.URL, bool) {
	u, err := url.Parse(text)
	hint := "for example " + example
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		k.bad(field, quote(text)+" is not an https URL", hint)
	case u.User != nil:
		k.bad(field, "a user name or password in the URL would be in the logs", "use a certificate")
	case u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.ForceQuery:
		k.bad(field, quote(text)+" has more than scheme, host and port", hint)
	case !validPort(u.Host):
		k.bad(field, quote(text)+" has no port", hint)
	default:
		return u, true
	}
	return nil, false
}

func validPort(hostPort string) bool {
	_, port, err := net.SplitHostPort(hostPort)
	if err != nil {
		return false
	}
	n, err := strconv.Atoi(port)
	return err == nil && n >= 1 && n <= 65535
}
