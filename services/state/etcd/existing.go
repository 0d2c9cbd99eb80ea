package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"krgimage/services/state"
)

// Files are the PEM files of one end of a TLS connection.
type Files struct {
	CA   string // authorities that the other end's certificate may be signed by
	Cert string // own certificate
	Key  string // its key
}

// ExistingConfig is what Existing works from.
type ExistingConfig struct {
	URLs      []string // https://HOST:PORT, or http:// without TLS
	Files     Files    // each may be empty: the system's authorities, no own certificate
	Namespace string   // before every key
	Log       *slog.Logger
}

// ErrUnreachable says that an existing etcd doesn't answer.
var ErrUnreachable = errors.New("etcd doesn't answer")

// Existing connects to an etcd that is there already, and makes sure that it
// answers and takes transactions as large as this cluster's. ctx bounds that.
func Existing(ctx context.Context, cfg ExistingConfig) (*Store, error) {
	log := logger(cfg.Log)
	config := clientv3.Config{
		Endpoints:            cfg.URLs,
		DialTimeout:          5 * time.Second,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		Logger:               log.zap(),
	}
	for _, u := range cfg.URLs {
		if strings.HasPrefix(u, "https://") {
			t, err := cfg.Files.client()
			if err != nil {
				return nil, fmt.Errorf("etcd (cluster.store): %w", err)
			}
			config.TLS = t
		}
	}
	client, err := clientv3.New(config)
	if err != nil {
		return nil, fmt.Errorf("etcd %s: %w", strings.Join(cfg.URLs, ", "), err)
	}
	s := newStore(client, cfg.Namespace, func() {})
	if err := s.probe(ctx); err != nil {
		s.Close()
		return nil, fmt.Errorf("etcd %s (cluster.store.urls): %w", strings.Join(cfg.URLs, ", "), err)
	}
	return s, nil
}

// probe reads a little and tries the size of transactions.
func (s *Store) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if _, _, err := s.List(ctx, "probe/"); err != nil {
		return fmt.Errorf("%w: %w; look at its address, certificates and health", ErrUnreachable, err)
	}
	txn := state.Txn{}
	for i := range state.MaxOps {
		txn.If = append(txn.If, state.Condition{Key: fmt.Sprintf("probe/%d", i)})
	}
	if _, err := s.Apply(ctx, txn); err != nil {
		return fmt.Errorf("it refuses transactions of %d operations, which the join of a whole cluster needs: start it with --max-txn-ops=%d: %w", state.MaxOps, state.MaxOps, err)
	}
	return nil
}

func (f Files) client() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.CA != "" {
		text, err := os.ReadFile(f.CA)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("%s holds no PEM certificate", f.CA)
		}
	}
	if f.Cert != "" || f.Key != "" {
		if _, err := tls.LoadX509KeyPair(f.Cert, f.Key); err != nil {
			return nil, fmt.Errorf("%s, %s: %w", f.Cert, f.Key, err)
		}
		// Read again at each connection: such files are renewed in place.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
			return &pair, err
		}
	}
	return config, nil
}
